// Sends a file that was chosen or dropped to the server, and tells Gradio under which name that holds it.
const area = element.querySelector('.drop');
const state = element.querySelector('.drop-state');

async function send(file) {
  if (!file) return;
  if (file.size > MAX_BYTES) {
    state.textContent = `${file.name} is larger than ${MAX_BYTES / 2 ** 20} MiB.`;
    return;
  }
  state.textContent = `Sending ${file.name} ...`;
  const form = new FormData();
  form.append('file', file);
  try {
    const response = await fetch('page/upload', {method: 'POST', body: form});
    const answer = await response.json();
    if (!response.ok) throw new Error(answer.detail);
    state.textContent = file.name;
    props.value = answer.name;
    trigger('submit');
  } catch (error) {
    state.textContent = `${file.name} could not be sent: ${error.message}`;
  }
}

element.addEventListener('change', event => {
  send(event.target.files[0]);
  event.target.value = ''; // so that the same file can be chosen again
});
for (const [kind, over] of [['dragover', true], ['dragleave', false], ['drop', false]]) {
  area.addEventListener(kind, event => {
    event.preventDefault();
    area.classList.toggle('over', over);
    if (kind === 'drop') send(event.dataTransfer.files[0]);
  });
}
area.dataset.ready = '';
