// Answers questions with unmodified transformers.js; how it is asked: transformers_js.py.
import fs from 'node:fs';

import { AutoModelForImageTextToText, AutoProcessor, RawImage, Tensor, env } from '@huggingface/transformers';

/** What a model says to one question, as token ids, with the picture as `task` says. */
async function answer(model, processor, task, maxNewTokens) {
  const content = task.image ? [{ type: 'image' }, { type: 'text', text: task.question }] : task.question;
  const prompt = processor.apply_chat_template([{ role: 'user', content }], { add_generation_prompt: true });
  const options = { add_special_tokens: false };
  const inputs = task.image
    ? await processor(await RawImage.read(task.image), prompt, options)
    : processor.tokenizer(prompt, options);
  if (task.pixels) {
    const bytes = fs.readFileSync(task.pixels);
    const values = new Float32Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length));
    const size = Math.sqrt(values.length / 3);
    inputs.pixel_values = new Tensor('float32', values, [1, 3, size, size]);
  }
  const output = await model.generate({ ...inputs, max_new_tokens: maxNewTokens });
  return output.tolist()[0].slice(inputs.input_ids.dims[1]).map(Number);
}

const job = JSON.parse(fs.readFileSync(0, 'utf8'));
env.allowRemoteModels = false;
env.localModelPath = job.models;
const results = [];
for (const { name, options } of job.loads) {
  try {
    const processor = await AutoProcessor.from_pretrained(name);
    const model = await AutoModelForImageTextToText.from_pretrained(name, options);
    const answers = [];
    for (const task of job.tasks) {
      answers.push(await answer(model, processor, task, job.max_new_tokens));
    }
    await model.dispose();
    results.push({ answers });
  } catch (error) {
    results.push({ error: String(error) });
  }
}
fs.writeFileSync(job.output, JSON.stringify({ results }));
