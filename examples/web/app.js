// The page: what people do, and what they see. The model is in worker.js.

import { pictureIn, readPicture } from './picture.js';
import { deleteStored, storedBytes } from './storage.js';

const $ = (id) => document.getElementById(id);
const megabytes = (bytes) => (bytes < 99.5e6 ? (bytes / 1e6).toFixed(1) : (bytes / 1e6).toFixed(0));

let settings, worker, picture, asked, article;
let state = 'opening'; // then opened, loading, ready, answering; or failed
let missingBytes = 0;
// A worker that computes takes no messages. Memory that both see reaches it, where the server's headers
// allow that.
const stopFlag = globalThis.crossOriginIsolated ? new Int32Array(new SharedArrayBuffer(4)) : undefined;

/** What went wrong, in words for people. */
function explain(during, details) {
  if (/external data/i.test(details)) {
    return 'This bundle is not made for browsers. Export one with a recipe whose name begins with "web".';
  }
  if (/out of memory|bad_alloc|allocation failed|invalid array length/i.test(details)) {
    return 'The model needs more memory than this browser gives it. Close other tabs, or use a smaller bundle.';
  }
  if (/could not locate|404|not found/i.test(details)) {
    return 'The model was not found on this server. Is the bundle in the folder that settings.json names?';
  }
  if (during === 'ask') return 'The model could not answer this question.';
  if (/failed to fetch|network|dynamically imported|load failed/i.test(details)) {
    return 'The download did not succeed. Check the connection and try again.';
  }
  return 'The model could not be started.';
}

/** Show the page as `state` and what is known besides say. */
function show() {
  const isBusy = state === 'loading' || state === 'answering';
  const needsDownload = missingBytes > 0 && (state === 'opened' || state === 'loading');
  $('ask').textContent = needsDownload ? `Download ${megabytes(missingBytes)} MB and ask` : 'Ask';
  $('ask').hidden = isBusy;
  $('ask').disabled = !picture || !['opened', 'ready'].includes(state);
  $('stop').hidden = !isBusy;
  $('stop').textContent = state === 'loading' ? 'Cancel' : 'Stop';
  $('device').disabled = $('delete').disabled = isBusy;
  $('progress').hidden = state !== 'loading';
  $('answers').setAttribute('aria-busy', String(state === 'answering'));
  const texts = {
    opening: 'Starting...',
    opened: picture ? '' : 'Choose a picture to begin.',
    loading: $('status').textContent,
    ready: picture ? '' : 'Choose a picture to begin.',
    answering: 'Answering...',
    failed: '',
  };
  if ($('status').textContent !== texts[state]) $('status').textContent = texts[state];
}

function enter(next) {
  state = next;
  show();
}

function showError(text, details = '', canRetry = true) {
  $('error').hidden = false;
  $('error-text').textContent = text;
  $('error-details').textContent = details;
  $('error').querySelector('details').hidden = !details;
  $('retry').hidden = !canRetry;
}

function hideError() {
  $('error').hidden = true;
}

async function showStored() {
  const bytes = await storedBytes();
  $('stored').textContent = `${megabytes(bytes)} MB stored in this browser`;
  $('stored').hidden = $('delete').hidden = bytes === 0;
}

/** A new worker, without a model; it loads one when it is stored already, or to answer `question`. */
function restart(question) {
  worker?.terminate();
  asked = question;
  article?.classList.remove('waiting');
  worker = new Worker('worker.js', { type: 'module' });
  worker.onmessage = ({ data }) => heard[data.type](data);
  worker.onerror = ({ message }) =>
    heard.error({ during: 'open', details: message ?? 'The worker failed to load.' });
  worker.postMessage({ type: 'open', settings, device: $('device').value, stopFlag });
  enter('opening');
}

const heard = {
  opened({ bytes }) {
    missingBytes = bytes;
    if (bytes > 0 && !asked) return enter('opened');
    startLoading();
  },
  progress({ loaded, total }) {
    if (state !== 'loading') return; // the others of several downloads, after one failed
    $('progress').max = total;
    $('progress').value = loaded;
    $('status').textContent =
      loaded < total
        ? `Downloading: ${megabytes(loaded)} of ${megabytes(total)} MB`
        : 'Preparing the model...';
  },
  ready() {
    missingBytes = 0;
    showStored();
    enter('ready');
    if (asked) sendQuestion();
  },
  text({ text }) {
    article.querySelector('p').textContent = text;
  },
  done({ text, tokens, firstSeconds, tokensPerSecond }) {
    article.querySelector('p').textContent = text;
    article.classList.remove('waiting');
    const speed = tokensPerSecond ? `, then ${tokensPerSecond.toFixed(1)} tokens per second` : '';
    const stopped = stopFlag && Atomics.load(stopFlag, 0) === 1 ? 'Stopped. ' : '';
    const note = `${stopped}First token after ${firstSeconds.toFixed(1)} s${speed} (${tokens} tokens)`;
    article.append(Object.assign(document.createElement('small'), { textContent: note }));
    asked = undefined;
    enter('ready');
  },
  error({ during, details }) {
    article?.classList.remove('waiting');
    if (during === 'ask') article.remove();
    enter(during === 'ask' ? 'ready' : 'failed');
    showError(explain(during, details), details);
  },
};

function startLoading() {
  $('progress').removeAttribute('value');
  $('status').textContent = missingBytes ? 'Downloading...' : 'Preparing the model...';
  enter('loading');
  worker.postMessage({ type: 'load' });
}

function sendQuestion() {
  article = document.createElement('article');
  article.className = 'waiting';
  article.append(
    Object.assign(document.createElement('h3'), { textContent: asked }),
    document.createElement('p'),
  );
  $('answers').prepend(article);
  if (stopFlag) Atomics.store(stopFlag, 0, 0);
  worker.postMessage({ type: 'ask', picture, question: asked });
  enter('answering');
}

/** Take a file of the person as the picture. */
async function choose(file) {
  if (!file) return;
  hideError();
  try {
    picture = await readPicture(file);
  } catch (error) {
    const name = file.name ? `"${file.name}"` : 'This file';
    showError(`${name} is no picture that this browser reads. Try a JPEG or PNG file.`, String(error), false);
    return;
  }
  URL.revokeObjectURL($('preview').src);
  $('preview').src = URL.createObjectURL(file);
  $('preview').hidden = false;
  $('drop').classList.add('full');
  $('drop').querySelector('strong').textContent = 'Choose another picture';
  $('answers').replaceChildren();
  show();
}

for (const input of [$('file'), $('camera')]) {
  input.addEventListener('change', () => {
    choose(input.files[0]);
    input.value = ''; // the same file can be chosen again
  });
}

document.addEventListener('paste', (event) => {
  const file = pictureIn(event.clipboardData);
  if (file) choose(file);
});
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
  const [first] = event.dataTransfer.files;
  choose(pictureIn(event.dataTransfer) ?? first);
});

$('form').addEventListener('submit', (event) => {
  event.preventDefault();
  const question = $('question').value.trim();
  if ($('ask').disabled || $('ask').hidden || !question) return;
  hideError();
  asked = question;
  if (state === 'ready') sendQuestion();
  else startLoading();
  $('stop').focus();
});

$('question').addEventListener('keydown', (event) => {
  if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $('form').requestSubmit();
  }
});

$('stop').addEventListener('click', () => {
  $('question').focus();
  if (state === 'answering' && stopFlag) Atomics.store(stopFlag, 0, 1);
  else restart(); // what is stored by now is not downloaded again
});

$('retry').addEventListener('click', () => {
  hideError();
  $('question').focus();
  if (state === 'failed') restart(asked);
  else $('form').requestSubmit();
});

$('device').addEventListener('change', () => {
  hideError();
  restart();
});

$('delete').addEventListener('click', async () => {
  await deleteStored();
  await showStored();
  $('status').textContent = 'The stored model is deleted.';
  $('question').focus();
});

/** Offer the GPU where it has what the graphs need. */
async function offerGpu() {
  const adapter = await navigator.gpu?.requestAdapter();
  if (!adapter?.features.has('shader-f16')) return;
  $('device').append(new Option('Graphics (WebGPU, experimental)', 'webgpu'));
  $('runs-on').hidden = false;
}

async function start() {
  const response = await fetch('settings.json');
  if (!response.ok) throw new Error(`settings.json: ${response.status}`);
  settings = await response.json();
  for (const key of ['library', 'runtime', 'host']) settings[key] = new URL(settings[key], location).href;
  await Promise.all([offerGpu(), showStored()]);
  restart();
}

show();
start().catch((error) => {
  enter('failed');
  showError(explain('open', String(error)), String(error), false);
});
