// The playground's page: asks the server for text, shows it, and draws speed and size of the state.
"use strict";

const PART_BYTES = 64 * 1024; // of a file, sent in one request
const MOST_CHARACTERS = 200_000; // kept on the page
const MOST_POINTS = 400; // of a chart

const at = (id) => document.getElementById(id);
let token = takeToken();
let model = null;
let text = null; // secret name of this tab's text
let place = { position: 0, state_bytes: 0 };
let busy = false;
let stopping = false;
const speeds = []; // [position, tokens per second]
const sizes = []; // [position, bytes]
let characters = 0; // of the text on the page
let unseen = ""; // what the model wrote since the page was last brought up to date
let waiting = false; // whether that will be done anyway

function takeToken() {
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (given) {
    sessionStorage.setItem("token", given);
    history.replaceState(null, "", location.pathname);
  }
  return sessionStorage.getItem("token");
}

async function ask(method, path, body) {
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  const answer = await fetch(`api/${path}`, { method, headers, body });
  if (answer.ok) return answer;
  const problem = new Error(await whyNot(answer));
  problem.status = answer.status;
  throw problem;
}

async function whyNot(answer) {
  const said = await answer.text();
  try {
    return JSON.parse(said).error;
  } catch {
    return `${answer.status} ${said}`;
  }
}

async function begin() {
  try {
    model = await (await ask("GET", "model")).json();
  } catch (problem) {
    at("token-form").hidden = problem.status !== 401;
    at("facts").textContent = problem.status === 401 ? "" : problem.message;
    if (problem.status === 401 && token) at("facts").textContent = "That token is not the right one.";
    return;
  }
  at("token-form").hidden = true;
  at("tool").hidden = false;
  at("name").textContent = ` of ${model.name}`;
  document.title = `${model.name}: vqlm playground`;
  at("facts").textContent =
    `${model.layers} layer${model.layers === 1 ? "" : "s"} of ${model.mixers.join(", ")}, width ${model.width}, ` +
    `${model.parameters.toLocaleString("en")} parameters; tokens are ${model.vocabulary}. ` +
    "Each tab is a text of its own; the server keeps its state, not its words.";
  at("n-token").max = model.limits.new_tokens;
  keep({ position: 0, state_bytes: model.state_bytes });
}

async function sure() {
  if (text !== null) return;
  const made = await (await ask("POST", "texts")).json();
  text = made.text;
  keep(made);
}

// speed: tokens per second of writing, which the chart shows, or of reading, which only the number
// shows: they are too far apart for one scale.
function keep(told, speed = null, reading = false) {
  place = { position: told.position, state_bytes: told.state_bytes };
  at("position").textContent = place.position.toLocaleString("en");
  at("state").textContent = size(place.state_bytes);
  if (speed !== null && reading) at("speed").textContent = speed.toFixed(0);
  if (speed !== null && !reading) {
    // Smoothed: one slice is too short to be more than noise.
    const before = speeds.length ? speeds[speeds.length - 1][1] : speed;
    const smooth = before + 0.2 * (speed - before);
    at("speed").textContent = smooth.toFixed(smooth < 10 ? 1 : 0);
    add(speeds, [place.position, smooth]);
  }
  add(sizes, [place.position, place.state_bytes]);
  if (waiting) return;
  waiting = true;
  setTimeout(refresh, 250); // laying out a page at every token would cost more than the tokens
}

function add(points, point) {
  if (points.length && points[points.length - 1][0] === point[0]) points.pop();
  points.push(point);
  if (points.length <= MOST_POINTS) return;
  const last = points.length - 1;
  const kept = points.filter((_, i) => i % 2 === 0 || i === last);
  points.splice(0, points.length, ...kept);
}

function size(bytes) {
  if (bytes < 1e3) return `${bytes} B`;
  if (bytes < 1e6) return `${(bytes / 1e3).toPrecision(3)} kB`;
  if (bytes < 1e9) return `${(bytes / 1e6).toPrecision(3)} MB`;
  return `${(bytes / 1e9).toPrecision(3)} GB`;
}

function short(number) {
  for (const [unit, letter] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (number >= unit) return `${+(number / unit).toPrecision(3)}${letter}`;
  }
  return `${+number.toPrecision(3)}`;
}

function show(words, kind) {
  const output = at("output");
  const follows = output.scrollHeight - output.scrollTop - output.clientHeight < 40;
  const last = output.lastElementChild;
  if (last && last.className === kind && kind === "written" && last.textContent.length < 4000) {
    last.append(words);
  } else {
    const part = document.createElement("span");
    part.className = kind;
    part.textContent = words;
    output.append(part);
  }
  characters += words.length;
  while (characters > MOST_CHARACTERS) {
    characters -= output.firstElementChild.textContent.length;
    output.firstElementChild.remove();
  }
  if (follows) output.scrollTop = output.scrollHeight;
}

function say(words, bad = false) {
  at("status").textContent = words;
  at("status").classList.toggle("bad", bad);
}

function setBusy(now) {
  busy = now;
  stopping = false;
  for (const id of ["write", "anew", "file"]) at(id).disabled = now;
  at("stop").disabled = !now;
  at("write").textContent = place.position > 0 ? "Continue" : "Write";
}

async function during(work) {
  if (busy) return;
  setBusy(true);
  try {
    await sure();
    await work();
  } catch (problem) {
    if (problem.status === 404) text = null; // the server has forgotten it: the next one is new
    say(problem.message, true);
  } finally {
    setBusy(false);
  }
}

async function read(blob, shown) {
  const began = performance.now();
  const from = place.position;
  for (let done = 0; done < blob.size && !stopping; ) {
    const part = blob.slice(done, done + PART_BYTES);
    done += part.size;
    const path = `texts/${text}/read${done < blob.size ? "?more=1" : ""}`;
    const before = performance.now();
    const told = await (await ask("POST", path, part)).json();
    const seconds = Math.max((performance.now() - before) / 1000, 1e-6);
    keep(told, (told.position - place.position) / seconds, true);
    at("progress").value = done / blob.size;
    if (shown) say(`Reading ${shown}: ${Math.round((100 * done) / blob.size)}%`);
  }
  const seconds = ((performance.now() - began) / 1000).toFixed(1);
  return `${(place.position - from).toLocaleString("en")} tokens read in ${seconds} s`;
}

async function load() {
  const file = at("file").files[0];
  if (!file) return;
  await during(async () => {
    at("progress").hidden = false;
    at("progress").value = 0;
    try {
      const how = await read(file, file.name);
      show(`[${file.name}: ${how}]\n`, "note");
      say(stopping ? `Stopped reading: ${how}.` : `${file.name}: ${how}.`);
    } finally {
      at("progress").hidden = true;
      at("file").value = "";
    }
  });
}

async function write() {
  await during(async () => {
    const wish = {
      n_token: at("n-token").valueAsNumber,
      temperature: at("temperature").valueAsNumber,
      top_p: at("top-p").valueAsNumber,
      may_end: at("may-end").checked,
    };
    const prompt = at("prompt").value;
    if (prompt) {
      say("Reading …");
      await read(new Blob([prompt]));
      show(prompt, "given");
      at("prompt").value = "";
    }
    if (stopping) return say(`Stopped at position ${place.position.toLocaleString("en")}.`);
    say("Writing …");
    const answer = await ask("POST", `texts/${text}/write`, JSON.stringify(wish));
    await follow(answer);
  });
}

async function follow(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let ended = false;
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    rest += value;
    const events = rest.split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const told = JSON.parse(event.slice("data: ".length));
      if (told.done) {
        ended = true;
        close(told);
      } else {
        unseen += told.delta;
        keep(told, told.tokens_per_second);
      }
    }
  }
  if (!ended) throw new Error("The server ended the text early; try again.");
}

function close(told) {
  keep(told);
  flush();
  const count = `${told.written.toLocaleString("en")} tokens`;
  if (told.done === "end") {
    show("\n[end of the document]\n", "note");
    say(`The model ended the document after ${count}.`);
  } else if (told.done === "stopped") {
    say(`Stopped after ${count}.`);
  } else {
    say(`${count} written.`);
  }
}

async function stop() {
  stopping = true;
  at("stop").disabled = true;
  try {
    await ask("POST", `texts/${text}/stop`);
  } catch (problem) {
    say(problem.message, true);
  }
}

async function anew() {
  const old = text;
  text = null;
  if (old) await ask("DELETE", `texts/${old}`).catch(() => {});
  speeds.length = sizes.length = 0;
  at("output").replaceChildren();
  unseen = "";
  characters = 0;
  at("speed").textContent = "–";
  keep({ position: 0, state_bytes: model.state_bytes });
  say("Nothing read yet.");
  setBusy(false);
  at("prompt").focus();
}

// --- charts

function refresh() {
  waiting = false;
  flush();
  draw();
}

function flush() {
  const words = unseen;
  unseen = "";
  if (words) show(words, "written");
}

function draw() {
  const last = place.position;
  line("speed-chart", [{ points: speeds, kind: "line" }], short);
  const grown = model.softmax_bytes_per_token;
  const softmax = [[sizes[0][0], grown * sizes[0][0]], [last, grown * last]];
  line("state-chart", [{ points: softmax, kind: "dashed" }, { points: sizes, kind: "line" }], size);
  const speed = speeds.length ? speeds[speeds.length - 1][1] : 0;
  at("speed-words").textContent = `At ${last} tokens: ${speed.toFixed(0)} tokens per second.`;
  at("state-words").textContent =
    `At ${last} tokens: ${size(place.state_bytes)}; softmax attention: ${size(grown * last)}.`;
}

function line(id, lines, label) {
  const svg = at(id);
  const width = svg.clientWidth || 320;
  const height = svg.clientHeight || 176;
  const [left, right, top, bottom] = [64, 12, 12, 24];
  const points = lines.flatMap((one) => one.points);
  const end = nice(Math.max(10, ...points.map((p) => p[0])));
  const most = nice(Math.max(1, ...points.map((p) => p[1])));
  const x = (v) => left + ((width - left - right) * v) / end;
  const y = (v) => height - bottom - ((height - top - bottom) * v) / most;
  const parts = [];
  for (const share of [0, 0.5, 1]) {
    const level = y(share * most);
    parts.push(shape("line", { class: "axis", x1: left, x2: width - right, y1: level, y2: level }));
    parts.push(shape("text", { x: left - 6, y: level + 4, "text-anchor": "end" }, label(share * most)));
    const anchor = share === 1 ? "end" : share === 0 ? "start" : "middle";
    const place = { x: x(share * end), y: height - 6, "text-anchor": anchor };
    parts.push(shape("text", place, short(share * end)));
  }
  for (const one of lines) {
    const path = one.points.map((p) => `${x(p[0]).toFixed(1)},${y(p[1]).toFixed(1)}`).join(" ");
    parts.push(shape("polyline", { class: one.kind, points: path }));
  }
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.replaceChildren(...parts);
}

function nice(value) {
  const unit = 10 ** Math.floor(Math.log10(value));
  return unit * [1, 2, 4, 5, 10].find((step) => step * unit >= value);
}

function shape(name, attributes, words) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (words !== undefined) made.textContent = words;
  return made;
}

at("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  token = at("token").value.trim();
  sessionStorage.setItem("token", token);
  begin();
});
at("write").addEventListener("click", write);
at("stop").addEventListener("click", stop);
at("anew").addEventListener("click", anew);
at("file").addEventListener("change", load);
at("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) write();
});
new ResizeObserver(() => model && draw()).observe(at("speed-chart"));
window.addEventListener("pagehide", () => {
  if (text) fetch(`api/texts/${text}`, {
    method: "DELETE", keepalive: true, headers: token ? { Authorization: `Bearer ${token}` } : {},
  });
});
begin();
