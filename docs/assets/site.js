// Browsers break lines after hyphens: options such as --config and names such as avcl-fingerprint
// stay whole in code, unless they are wider than a phone.
const HYPHENATED = /([\w.]*-[\w.-]*\w)/;
for (const code of document.querySelectorAll("code")) {
  const walker = document.createTreeWalker(code, NodeFilter.SHOW_TEXT);
  const texts = [];
  while (walker.nextNode()) texts.push(walker.currentNode);
  for (const text of texts) {
    const parts = text.data.split(HYPHENATED);
    if (parts.length < 2) continue;
    text.replaceWith(
      ...parts.map((part, number) => {
        if (number % 2 === 0 || part.length > 36) return part;
        const whole = document.createElement("span");
        whole.className = "whole";
        whole.textContent = part;
        return whole;
      }),
    );
  }
}
