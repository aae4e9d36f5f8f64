// Answers questions with unmodified transformers.js in Chromium; how it is asked: browser.py.
import fs from 'node:fs';

import { readJob, withBrowser, writeResult } from './browser.mjs';

/** Runs in the page: one load of the model, and the answers to all tasks. */
async function answers({ load, tasks, maxNewTokens }) {
  const { library, model: name } = await (await fetch('/settings.json')).json();
  const { AutoModelForImageTextToText, AutoProcessor, RawImage, Tensor, env } = await import(`/${library}`);
  const bytes = async (base64) => (await fetch(`data:;base64,${base64}`)).arrayBuffer();
  env.remoteHost = `${location.origin}/`;
  env.remotePathTemplate = '{model}/';
  env.useBrowserCache = false;
  env.useWasmCache = false;
  env.backends.onnx.wasm.wasmPaths = load.runtime;
  const adapter = await navigator.gpu?.requestAdapter();
  const features = adapter ? [...adapter.features] : [];
  try {
    const processor = await AutoProcessor.from_pretrained(name);
    const model = await AutoModelForImageTextToText.from_pretrained(name, load.options);
    const result = [];
    for (const task of tasks) {
      const content = [{ type: 'image' }, { type: 'text', text: task.question }];
      const prompt = processor.apply_chat_template([{ role: 'user', content }], {
        add_generation_prompt: true,
      });
      const image = await RawImage.fromBlob(new Blob([await bytes(task.image)]));
      const inputs = await processor(image, prompt, { add_special_tokens: false });
      if (task.pixels) {
        const values = new Float32Array(await bytes(task.pixels));
        const size = Math.sqrt(values.length / 3);
        inputs.pixel_values = new Tensor('float32', values, [1, 3, size, size]);
      }
      const output = await model.generate({ ...inputs, max_new_tokens: maxNewTokens });
      result.push(output.tolist()[0].slice(inputs.input_ids.dims[1]).map(Number));
    }
    await model.dispose();
    return { features, error: null, answers: result };
  } catch (error) {
    return { features, error: String(error?.message ?? error), answers: [] };
  }
}

const job = readJob();
const base64 = (file) => file && fs.readFileSync(file, 'base64');
const tasks = job.tasks.map((task) => ({ ...task, image: base64(task.image), pixels: base64(task.pixels) }));
const results = [];
await withBrowser(job, async (context, failures) => {
  for (const load of job.loads) {
    const page = await context.newPage();
    await page.goto(`${job.url}style.css`); // any file of the server will do
    const result = await page.evaluate(answers, { load, tasks, maxNewTokens: job.max_new_tokens });
    results.push(result.error ? { ...result, error: [result.error, ...failures].join('\n') } : result);
    await page.close();
  }
});
writeResult(job, { results });
