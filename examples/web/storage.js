// What the library keeps in the browser between visits.

const NAME = 'transformers-cache';

/** Bytes that are stored: the model's files and the runtime. */
export async function storedBytes() {
  if (!globalThis.caches || !(await caches.has(NAME))) return 0;
  const cache = await caches.open(NAME);
  let bytes = 0;
  for (const request of await cache.keys()) {
    const response = await cache.match(request);
    bytes += Number(response.headers.get('content-length')) || (await response.blob()).size;
  }
  return bytes;
}

/** Remove all of it. */
export const deleteStored = () => caches.delete(NAME);
