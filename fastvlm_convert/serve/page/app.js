// The page: what people do, and what they see. What the server says is only ever inserted as text.

import { pictureIn, readPicture } from './picture.js';

const $ = (id) => document.getElementById(id);
const KEY = 'fastvlm-api-key';
const CACHES = {
  hit: 'whole answer from the cache',
  prefix: 'picture and start of the prompt from the cache',
  feature: 'picture from the cache',
  miss: 'nothing from the cache',
};

let picture; // { url, ... } of picture.js
let request; // the AbortController of the answer that is being written
let retry; // what to do once there is a key

/** An element with a text. */
function element(tag, text = '', properties = {}) {
  return Object.assign(document.createElement(tag), { textContent: text, ...properties });
}

function show() {
  $('ask').hidden = Boolean(request);
  $('stop').hidden = !request;
  $('ask').disabled = !picture;
  $('answers').setAttribute('aria-busy', String(Boolean(request)));
  $('status').textContent = request ? 'Answering...' : picture ? '' : 'Choose a picture to begin.';
}

function showError(text) {
  $('error').textContent = text;
  $('error').hidden = !text;
}

/** What went wrong, as a sentence for people; `error` is that of OpenAI's format. */
function explain(error, status, retryAfter) {
  const text = error?.message || `the server answered with status ${status}`;
  const sentence = text[0].toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? '' : '.');
  return retryAfter ? `${sentence} Try again in ${retryAfter} s.` : sentence;
}

/** Ask the server; the key goes into a header, never into an address. */
async function send(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  const response = await fetch(path, { ...options, headers, credentials: 'omit', redirect: 'error' });
  if (response.ok) return response;
  const { error } = await response.json().catch(() => ({}));
  const failure = new Error(explain(error, response.status, response.headers.get('retry-after')));
  throw Object.assign(failure, { status: response.status, hadKey: Boolean(key) });
}

/** Show the form for the key; afterwards, `action` is done again. */
function askForKey(failure, action) {
  retry = action;
  sessionStorage.removeItem(KEY);
  $('key-form').hidden = false;
  $('key-fault').textContent = failure.hadKey ? failure.message : '';
  $('key').focus();
}

/** Do something that the server may refuse. */
async function attempt(action) {
  showError('');
  try {
    await action();
  } catch (failure) {
    if (failure.status === 401) askForKey(failure, action);
    else if (failure instanceof TypeError) showError('The server cannot be reached. Is it still running?');
    else showError(failure.message);
  }
}

async function loadModels() {
  const { data } = await (await send('v1/models')).json();
  $('model').replaceChildren(...data.map(({ id }) => new Option(id, id)));
  $('model-row').hidden = data.length < 2;
}

/** The events of a stream of server-sent events, parsed. */
async function* events(body) {
  let rest = '';
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) throw new Error('The connection ended before the answer did.');
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) {
        if (line === 'data: [DONE]') return;
        if (line.startsWith('data:')) yield JSON.parse(line.slice(5));
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // it may have failed
  }
}

const milliseconds = (value) => (value < 10_000 ? `${Math.round(value)} ms` : `${(value / 1000).toFixed(1)} s`);

/** What stands below an answer: what was waited for, what it took on the server, and which cache helped. */
function facts({ firstToken, total, usage, timings, cache }) {
  const list = element('dl');
  const add = (name, text) => list.append(element('dt', name), element('dd', text));
  add('First token', milliseconds(firstToken ?? total));
  add('Whole answer', milliseconds(total));
  if (usage) add('Tokens', `${usage.completion_tokens} (prompt ${usage.prompt_tokens})`);
  const stages = Object.entries(timings ?? {}).filter(([, value]) => Number.isFinite(value));
  if (stages.length)
    add('Server', stages.map(([name, value]) => `${name.replace(/_ms$/, '')} ${milliseconds(value)}`).join(', '));
  if (cache) add('Cache', CACHES[cache] ?? cache);
  return list;
}

function body(question) {
  const content = [
    { type: 'image_url', image_url: { url: picture.url } },
    { type: 'text', text: question },
  ];
  const messages = [{ role: 'user', content }];
  const model = $('model').value || undefined; // the server chooses while the list is not known
  return JSON.stringify({ model, messages, stream: true, stream_options: { include_usage: true } });
}

/** Read an answer into an article while it is written. */
async function readAnswer(response, article, began) {
  const seen = { cache: response.headers.get('x-fastvlm-cache') };
  for await (const chunk of events(response.body)) {
    if (chunk.error) throw new Error(explain(chunk.error));
    const text = chunk.choices?.[0]?.delta?.content;
    if (text) {
      seen.firstToken ??= performance.now() - began;
      article.querySelector('p').append(text);
    }
    seen.usage = chunk.usage ?? seen.usage;
    seen.timings = chunk.timings ?? seen.timings;
  }
  article.append(facts({ ...seen, total: performance.now() - began }));
}

/** Ask a question about the picture, and show the answer; each question stands alone. */
async function ask(question) {
  const article = element('article', '', { className: 'waiting' });
  const several = !$('model-row').hidden;
  article.append(element('h3', several ? `${question} (${$('model').value})` : question), element('p'));
  $('answers').prepend(article);
  request = new AbortController();
  const { signal } = request;
  const headers = { 'Content-Type': 'application/json' };
  const began = performance.now();
  show();
  $('stop').focus();
  try {
    const response = await send('v1/chat/completions', { method: 'POST', headers, body: body(question), signal });
    await readAnswer(response, article, began);
  } catch (failure) {
    if (signal.aborted) {
      article.append(element('small', 'Stopped.'));
      return;
    }
    if (article.querySelector('p').textContent) article.append(element('small', 'The answer is not complete.'));
    else article.remove();
    throw failure;
  } finally {
    article.classList.remove('waiting');
    if (document.activeElement === $('stop')) $('question').focus();
    request = undefined;
    show();
  }
}

/** Take a file of the person as the picture. */
async function choose(file) {
  if (!file) return;
  showError('');
  try {
    picture = await readPicture(file);
  } catch {
    showError(`"${file.name}" is no picture that this browser reads. Try a JPEG, PNG or WebP file.`);
    return;
  }
  URL.revokeObjectURL($('preview').src);
  $('preview').src = URL.createObjectURL(picture.shown);
  $('preview').hidden = false;
  $('drop').classList.add('full');
  $('drop-action').textContent = 'Choose another picture';
  $('picture-note').textContent = picture.isConverted ? 'Sent as PNG, which the server takes; this format it may not.' : '';
  request?.abort(); // it was about the previous picture
  $('answers').replaceChildren();
  show();
}

$('file').addEventListener('change', () => {
  choose($('file').files[0]);
  $('file').value = ''; // the same file can be chosen again
});
document.addEventListener('paste', (event) => choose(pictureIn(event.clipboardData)));
document.addEventListener('dragover', (event) => {
  event.preventDefault();
  $('drop').classList.add('over');
});
document.addEventListener('dragleave', (event) => {
  if (!event.relatedTarget) $('drop').classList.remove('over');
});
document.addEventListener('drop', (event) => {
  event.preventDefault();
  $('drop').classList.remove('over');
  choose(pictureIn(event.dataTransfer));
});

$('form').addEventListener('submit', (event) => {
  event.preventDefault();
  const question = $('question').value.trim();
  if (picture && !request && question) attempt(() => ask(question));
});
$('question').addEventListener('keydown', (event) => {
  if (event.key !== 'Enter' || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $('form').requestSubmit();
});
$('stop').addEventListener('click', () => request?.abort());

$('key-form').addEventListener('submit', async (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, $('key').value.trim());
  $('key').value = '';
  $('key-form').hidden = true;
  $('question').focus();
  const again = retry;
  await attempt(loadModels);
  if ($('key-form').hidden && again !== loadModels) await attempt(again);
  else retry = again;
});

show();
attempt(loadModels);
