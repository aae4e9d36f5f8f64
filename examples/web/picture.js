// Files of people -> pixels for the model.

// Larger pictures are shrunk first: the model sees a square of 1024 pixels, and phones have little memory.
const LONGEST_EDGE = 2048;

/**
 * Decode a picture, upright and on white.
 * @param {Blob} file A picture in any format that the browser reads.
 * @returns {Promise<{data: Uint8ClampedArray, width: number, height: number}>} RGBA bytes, opaque.
 * @throws {DOMException} The browser cannot read it.
 */
export async function readPicture(file) {
  // The model was trained on the numbers in the file, whatever their color profile.
  const bitmap = await createImageBitmap(file, { colorSpaceConversion: 'none' });
  const scale = Math.min(1, LONGEST_EDGE / Math.max(bitmap.width, bitmap.height));
  const width = Math.max(1, Math.round(bitmap.width * scale));
  const height = Math.max(1, Math.round(bitmap.height * scale));
  const canvas = Object.assign(document.createElement('canvas'), { width, height });
  const context = canvas.getContext('2d', { willReadFrequently: true });
  context.imageSmoothingQuality = 'high';
  context.fillStyle = 'white';
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0, width, height);
  bitmap.close();
  const { data } = context.getImageData(0, 0, width, height);
  return { data, width, height };
}

/** The first picture in what was dropped or pasted, if there is one. */
export function pictureIn(transfer) {
  return [...(transfer?.files ?? [])].find((file) => file.type.startsWith('image/'));
}
