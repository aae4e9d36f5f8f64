// The model, in a thread of its own: WebAssembly would block the page while it computes.
//
// Takes {type: "open", settings, device, stopFlag}, {type: "load"}, and {type: "ask", picture, question}.
// Answers with {type: "opened" | "progress" | "ready" | "text" | "done" | "error", ...}.

let library, settings, device, stopFlag, processor, model;

// Builds of onnxruntime-web; the one with WebGPU also runs on the processor, but is twice as large.
const RUNTIMES = {
  wasm: { file: 'ort-wasm-simd-threaded', bytes: 14264838 },
  webgpu: { file: 'ort-wasm-simd-threaded.asyncify', bytes: 26861777 },
};

/** `fetch` that tells how much has come, of files that are asked for as a whole. */
function counting(total) {
  let loaded = 0;
  let shown = 0;
  return async (...request) => {
    const response = await fetch(...request);
    if (response.status !== 200) return response;
    const counter = new TransformStream({
      transform(chunk, controller) {
        controller.enqueue(chunk);
        loaded += chunk.byteLength;
        if (loaded - shown < 1e5 && loaded < total) return;
        shown = loaded;
        postMessage({ type: 'progress', loaded, total });
      },
    });
    return new Response(response.body.pipeThrough(counter), response);
  };
}

/** Import the library, and find out what has to be downloaded. */
async function open(given) {
  ({ settings, device, stopFlag } = given);
  library = await import(settings.library);
  const { env, ModelRegistry } = library;
  env.remoteHost = settings.host;
  env.remotePathTemplate = settings.path;
  const runtime = RUNTIMES[device];
  const wasm = `${settings.runtime}${runtime.file}.wasm`;
  env.backends.onnx.wasm.wasmPaths = { mjs: `${settings.runtime}${runtime.file}.mjs`, wasm };

  const files = await ModelRegistry.get_files(settings.model, { device });
  const facts = await Promise.all(files.map((file) => ModelRegistry.get_file_metadata(settings.model, file)));
  const absent = files.filter((_, index) => !facts[index].exists);
  if (absent.length) throw new Error(`Could not locate ${absent.join(', ')}`);
  const sizes = facts.filter((fact) => !fact.fromCache).map((fact) => fact.size);
  if (!(await caches.match(wasm))) sizes.push(runtime.bytes);
  const bytes = sizes.reduce((sum, size) => sum + size, 0);
  env.fetch = counting(bytes);
  return { type: 'opened', bytes };
}

/** Download what is not stored yet, and start the sessions. */
async function load() {
  const { AutoModelForImageTextToText, AutoProcessor } = library;
  processor = await AutoProcessor.from_pretrained(settings.model);
  model = await AutoModelForImageTextToText.from_pretrained(settings.model, { device });
  return { type: 'ready' };
}

/** Answer a question about a picture of {data: RGBA bytes, width, height}. */
async function ask({ picture, question }) {
  const { RawImage, StoppingCriteria, TextStreamer } = library;
  const image = new RawImage(picture.data, picture.width, picture.height, 4).rgb();
  const content = [{ type: 'image' }, { type: 'text', text: question }];
  const prompt = processor.apply_chat_template([{ role: 'user', content }], { add_generation_prompt: true });
  const inputs = await processor(image, prompt, { add_special_tokens: false });

  class Stopped extends StoppingCriteria {
    _call(ids) {
      return ids.map(() => stopFlag !== undefined && Atomics.load(stopFlag, 0) === 1);
    }
  }
  const started = performance.now();
  const ids = [];
  let text = '';
  let first;
  const streamer = new TextStreamer(processor.tokenizer, {
    skip_prompt: true,
    callback_function: () => {}, // it would hold back what is not a whole word yet
    token_callback_function: (tokens) => {
      first ??= performance.now();
      ids.push(...tokens);
      // Half a character waits for the rest.
      const decoded = processor.tokenizer.decode(ids, { skip_special_tokens: true });
      if (!decoded.endsWith('\ufffd')) text = decoded;
      postMessage({ type: 'text', text });
    },
  });
  await model.generate({ ...inputs, streamer, stopping_criteria: [new Stopped()] });
  const ended = performance.now();
  return {
    type: 'done',
    text,
    tokens: ids.length,
    firstSeconds: (first - started) / 1000,
    tokensPerSecond: ids.length > 1 ? ((ids.length - 1) * 1000) / (ended - first) : undefined,
  };
}

const steps = { open, load, ask };

onmessage = async ({ data }) => {
  try {
    postMessage(await steps[data.type](data));
  } catch (error) {
    postMessage({ type: 'error', during: data.type, details: String(error?.message ?? error) });
  }
};
