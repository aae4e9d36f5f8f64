// Files of people -> data URLs as the server takes them.

// What the server takes by default, by the bytes that files begin with. Names and types of files can be wrong.
const SIGNATURES = {
  'image/png': /^\x89PNG\r\n\x1a\n/,
  'image/jpeg': /^\xff\xd8\xff/,
  'image/webp': /^RIFF[^]{4}WEBP/,
};

function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

/** The same pixels as PNG, upright, if the browser can decode the file. */
async function asPng(file) {
  const bitmap = await createImageBitmap(file, { colorSpaceConversion: 'none' });
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  canvas.getContext('2d').drawImage(bitmap, 0, 0);
  bitmap.close();
  return canvas.convertToBlob({ type: 'image/png' });
}

/**
 * A picture as a request has it.
 * @param {Blob} file A file; PNG, JPEG and WebP are sent byte for byte, what else the browser reads as PNG.
 * @returns {Promise<{url: string, shown: Blob, isConverted: boolean}>} Its data URL, and what can be shown.
 * @throws {DOMException} The browser cannot read it.
 */
export async function readPicture(file) {
  const start = String.fromCharCode(...new Uint8Array(await file.slice(0, 12).arrayBuffer()));
  const type = Object.keys(SIGNATURES).find((candidate) => SIGNATURES[candidate].test(start));
  const shown = type ? new Blob([file], { type }) : await asPng(file);
  return { url: await dataUrl(shown), shown, isConverted: !type };
}

/** The first picture in what was dropped or pasted, else the first file. */
export function pictureIn(transfer) {
  const given = [...(transfer?.files ?? [])];
  return given.find((file) => file.type.startsWith('image/')) ?? given[0];
}
