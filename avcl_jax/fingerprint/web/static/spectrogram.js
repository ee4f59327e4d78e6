// Spectrogram: pitch upwards, time to the right, loudness as ink.

export function drawSpectrogram(canvas, spectrogram, from, to, ink) {
  const bytes = Uint8Array.from(atob(spectrogram.data), (letter) => letter.charCodeAt(0));
  const { columns, rows } = spectrogram;
  const style = getComputedStyle(document.documentElement);
  canvas.width = columns;
  canvas.height = rows;
  const context = canvas.getContext("2d");
  // The page's inks are all written #rrggbb.
  const number = parseInt(style.getPropertyValue(ink).trim().slice(1), 16);
  const [red, green, blue] = [number >> 16, (number >> 8) & 255, number & 255];
  const image = context.createImageData(columns, rows);
  for (let x = 0; x < columns; x += 1) {
    // Only what lies beside the other one, so that equal places stand above each other.
    const seconds = from + ((x + 0.5) / columns) * (to - from);
    const column = Math.floor(((seconds - spectrogram.start_seconds) / spectrogram.seconds) * columns);
    for (let y = 0; y < rows; y += 1) {
      const loudness = column < 0 || column >= columns ? 0 : bytes[column * rows + rows - 1 - y];
      image.data.set([red, green, blue, loudness], 4 * (y * columns + x));
    }
  }
  context.putImageData(image, 0, 0);
}
