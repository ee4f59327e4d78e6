// Numbers as people read them.

export function clock(seconds, digits = 1) {
  const sign = seconds < -0.5 / 10 ** digits ? "−" : "";
  const scale = 10 ** digits;
  const rounded = Math.round(Math.abs(seconds) * scale) / scale;
  const hours = Math.floor(rounded / 3600), minutes = Math.floor((rounded % 3600) / 60);
  const rest = (rounded % 60).toFixed(digits).padStart(digits ? 3 + digits : 2, "0");
  return hours ? `${sign}${hours}:${String(minutes).padStart(2, "0")}:${rest}`
    : `${sign}${minutes}:${rest}`;
}

export function bytes(count) {
  const megabytes = count / 2 ** 20;
  return megabytes >= 1000 ? `${(megabytes / 1024).toFixed(1)}\u00a0GB`
    : megabytes >= 10 ? `${Math.round(megabytes)}\u00a0MB` : `${megabytes.toFixed(1)}\u00a0MB`;
}

export function plural(count, noun) {
  return `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
}

// A score is −log10 of a chance: 3 is "1 in 1,000".
export function chance(score) {
  // Further out the fitted distribution says more than the few clips that it was fitted to.
  if (score > 6) return "Fewer than one unrelated clip in a million";
  const many = new Intl.NumberFormat("en", { maximumSignificantDigits: 2 });
  return `One unrelated clip in ${many.format(10 ** Math.max(score, 0))}`;
}

export function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key.startsWith("aria-") || key === "role") made.setAttribute(key, value);
    else made[key] = value;
  }
  made.append(...children);
  return made;
}
