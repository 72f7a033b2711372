// draw.py's page: the form is what is asked for; what is painted is shown as it comes.
const facts = await (await fetch("facts")).json(), snapshots = facts.snapshots;
const $ = (id) => document.getElementById(id), form = document.forms[0];
const add = (parent, tag, properties, style) => {
  const element = Object.assign(document.createElement(tag), properties);
  Object.assign(element.style, style);
  return parent.appendChild(element);
};
const say = (text) => ($("status").textContent = text.trim());

// The drawing: strokes of points, in shares of the side
const canvas = $("canvas"), pen = canvas.getContext("2d");
let strokes, stroke, example = true;
pen.scale(canvas.width, canvas.height);
Object.assign(pen, { strokeStyle: "white", lineCap: "round", lineJoin: "round", lineWidth: 0.01 }); // as in fill50k

function draw(drawing) {
  strokes = drawing;
  pen.fillRect(0, 0, 1, 1);
  for (const [[x, y], ...points] of strokes) {
    pen.beginPath();
    pen.moveTo(x, y);
    for (const point of [[x + 0.001, y], ...points]) pen.lineTo(...point); // a click is a dot
    pen.stroke();
  }
  $("placeholder").hidden = strokes.length && !example;
}

function drawRing() {
  const [x, y, radius] = ["x", "y", "radius"].map((name) => form[name].valueAsNumber);
  const angles = Array.from({ length: 97 }, (_, i) => (i * Math.PI) / 48);
  draw([angles.map((angle) => [x + radius * Math.cos(angle), y + radius * Math.sin(angle)])]);
}

function edit(drawing) {
  example = false;
  draw(drawing);
  changed();
}

const place = (event) => [event.offsetX / canvas.clientWidth, event.offsetY / canvas.clientHeight];
canvas.onpointerdown = (event) => {
  if (!event.isPrimary) return canvas.onpointercancel(); // the second finger of a pinch
  if (event.button !== 0) return;
  canvas.setPointerCapture(event.pointerId);
  stroke = [place(event)];
  draw(example ? [stroke] : [...strokes, stroke]);
  example = false;
};
canvas.onpointermove = (event) => stroke?.push(place(event)) && draw(strokes);
canvas.onpointerup = () => {
  if (stroke) edit(strokes);
  stroke = null;
};
canvas.onpointercancel = () => {
  draw(strokes.filter((other) => other !== stroke));
  stroke = null;
};
$("undo").onclick = () => edit(strokes.slice(0, -1));
$("clear").onclick = () => edit([]);

// Asking. A newer request closes the connection of the older one, whose painting then ends.
const pictures = new Map(); // step -> what was painted, in the order of painting
let upload, asking = new AbortController(), waiting, predicted, notes;

function changed(pressed = false) {
  asking.abort();
  clearTimeout(waiting);
  stop();
  for (const result of document.querySelectorAll(".result")) result.classList.add("old");
  const drawn = form.tab.value !== "picture";
  const missing = drawn ? "Nothing is drawn: draw a line in the black square." : "There is no picture yet: choose one.";
  if (drawn ? !strokes.length : !upload) return say(pressed ? missing : "");
  say(facts.live || pressed ? "" : "Press Paint.");
  if (facts.live || pressed) waiting = setTimeout(ask, 150);
}

async function ask() {
  const mine = (asking = new AbortController());
  const hint = form.tab.value === "picture" ? upload : { picture: canvas.toDataURL(), name: "the drawing" };
  const body = JSON.stringify({ ...Object.fromEntries(new FormData(form)), ...hint });
  say("Waiting for its turn…");
  try {
    const answer = await fetch("paint", { method: "POST", body, signal: mine.signal });
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let rest = "", part; !(part = await reader.read()).done; ) {
      const lines = (rest + part.value).split("\n");
      rest = lines.pop();
      if (mine === asking) lines.forEach((line) => show(JSON.parse(line)));
    }
  } catch (error) {
    if (error.name !== "AbortError") say("draw.py does not answer: its terminal says why.");
  }
}

function put(name, picture, caption) {
  $(name).src = picture;
  $(name).closest(".result").classList.remove("old");
  $(name).closest("figure").querySelector("figcaption").textContent = caption;
}

function show(event) {
  if (event.hint) {
    [$("outline").src, notes, predicted] = [event.hint, event.notes.join("; "), 0];
    pictures.clear();
    say(`Painting… ${notes}`);
  }
  if (event.alone) put("alone", event.alone, "The base alone, without the hint");
  if (event.predicted) put("sample", event.predicted, `Predicted at DDIM step ${++predicted} of ${form.steps.value}`);
  if (event.picture) {
    pictures.set(event.step, event);
    say(`Painted: ${pictures.size} of ${snapshots.length} snapshots. ${notes}`);
    if (first < last) showTraining();
    goTo(slider.value);
  }
  if (event.done) say(`${verdict} ${notes}`);
  if (event.error) say(event.error);
}

// The training: the slider swaps pictures; each one's distance from the base's is a dot below it
const slider = $("step"), first = snapshots[0], last = snapshots.at(-1);
const across = (step) => (100 * (step - first)) / (last - first || 1);
const inOrder = (some) => some.sort((a, b) => a.step - b.step);
const slots = snapshots.slice(0, 12).map(() => {
  const slot = add($("strip"), "button", { type: "button", disabled: true });
  slot.onclick = () => goTo(slot.value);
  return [slot, add(slot, "img", { alt: "" }), add(slot, "span", { textContent: "step …" })];
});
let playing, verdict = "";

function goTo(step) {
  slider.value = step;
  if (!pictures.size) return;
  const away = (one) => Math.abs(one.step - step);
  const shown = [...pictures.values()].reduce((a, b) => (away(b) < away(a) ? b : a));
  put("sample", shown.picture, first === last ? "With the hint" : `With the hint, step ${shown.step}`);
  $("cursor").style.left = `${across(step)}%`;
  for (const [slot] of slots) slot.ariaCurrent = slot.value == shown.step;
}

function showTraining() {
  const painted = inOrder([...pictures.values()]), most = Math.max(0.2, ...painted.map((one) => one.distance));
  const after = painted.findIndex((one) => one.distance > painted.at(-1).distance / 2);
  const jump = after > 0 && painted.at(-1).distance > 0.05 && [painted[after - 1].step, painted[after].step];
  verdict = jump
    ? `Between steps ${jump[0]} and ${jump[1]} the picture turns to your drawing: the jump.`
    : "No jump: the picture is the base’s own from first to last.";
  $("marks").replaceChildren();
  for (const { step, distance } of painted) {
    add($("marks"), "i", {}, { left: `${across(step)}%`, bottom: `${(80 * distance) / most}%` });
  }
  const between = jump && snapshots.filter((step) => jump[0] < step && step < jump[1]); // it may be at any of these
  if (jump && !between.length) add($("marks"), "b", { textContent: "the jump" }, { left: `${across((jump[0] + jump[1]) / 2)}%` });
  const told = painted.map((one) => `${Math.round(100 * one.distance)} % at step ${one.step}`);
  $("plot").ariaLabel = `How far your picture is from the base's: ${told.join(", ")}.`;
  const dozen = inOrder([...pictures.values()].slice(0, slots.length));
  slots.forEach(([slot, image, caption], i) => {
    const { step, picture } = dozen[i] ?? { step: "…", picture: "data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg'/>" };
    slot.disabled = !dozen[i];
    [slot.value, image.src, caption.textContent] = [step, picture, `step ${step}`];
  });
  $("through").classList.remove("old");
}

function stop() {
  clearInterval(playing);
  playing = null;
  $("play").textContent = "Play the training";
}

$("play").onclick = () => {
  if (playing) return stop();
  const rest = [...snapshots];
  goTo(rest.shift());
  playing = setInterval(() => (rest.length ? goTo(rest.shift()) : stop()), Math.min(250, 6000 / rest.length));
  $("play").textContent = "Stop";
};
slider.oninput = () => {
  stop();
  goTo(slider.value);
};

// The form's parts, and what they do
for (const [name, chosen] of [["disc", "coral"], ["background", "navy"]]) {
  for (const colour of facts.colours) {
    const swatch = { type: "radio", name, value: colour, title: colour, ariaLabel: colour, checked: colour === chosen };
    add($(name), "input", swatch, { background: colour.replaceAll(" ", "") });
  }
}
for (const [name, [label, min, max, step, value]] of Object.entries(facts.numbers)) {
  const input = { type: "number", name, min, max, step, value };
  add(add($("numbers"), "label", { textContent: `${label} ` }), "input", input);
}
for (const mode of facts.modes) add(form.mode, "option", { textContent: mode });
$("kind").textContent = facts.detect === "none" ? "White lines on black." : `Its lines are found by ${facts.detect}.`;
const apart = Math.min(...snapshots.slice(1).map((step, i) => step - snapshots[i]));
Object.assign(slider, { min: first, max: last, step: apart, value: last });
for (const part of [0, 0.25, 0.5, 0.75, 1]) {
  add($("plot"), "small", { textContent: Math.round(first + part * (last - first)) }, { left: `${100 * part}%` });
}
for (const [name, points] of Object.entries(facts.curves)) {
  $(name).setAttribute("points", points.map(([step, height]) => `${across(step)},${90 - 80 * height}`).join(" "));
}

form.oninput = ({ target: { name } }) => {
  if (["x", "y", "radius"].includes(name)) example = drawRing();
  const { disc, background, prompt } = form;
  if (["disc", "background"].includes(name)) prompt.value = `${disc.value} circle with ${background.value} background`;
  if (name) changed();
};
form.onsubmit = (event) => {
  event.preventDefault();
  changed(true);
};
$("file").onchange = ({ target: { files: [file] } }) => {
  upload = null;
  changed();
  if (file?.size > facts.largest) return say(`${file.name} has more than 20 MB: send a smaller one.`);
  const reader = new FileReader();
  reader.onload = () => {
    upload = { picture: ($("sent").src = reader.result), name: file.name };
    changed();
  };
  if (file) reader.readAsDataURL(file);
};

document.body.className = last > first ? "run" : "single";
drawRing();
changed();
