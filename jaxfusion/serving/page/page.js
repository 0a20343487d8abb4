// Asks this server alone: /api/about once, then for each text the two answers (streamed) and
// /api/explain for what is behind them.
"use strict";

const find = (id) => document.getElementById(id);
const make = (name, fields = {}, ...children) => {
  const element = Object.assign(document.createElement(name), fields);
  element.append(...children);
  return element;
};
const percent = (share) => `${(100 * share).toFixed(1)} %`;
let about = null;
let running = null;

// The server

/** A request with the token, which is asked for where the server wants it. */
async function request(path, body, signal) {
  for (;;) {
    const token = sessionStorage.getItem("token");
    const headers = token ? { Authorization: `Bearer ${token}` } : {};
    if (body) headers["Content-Type"] = "application/json";
    const reply = await fetch(path, {
      method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal,
    });
    if (reply.ok) return reply;
    if (reply.status === 401) {
      await askForToken(token !== null);
      continue;
    }
    const error = await reply.json().catch(() => null);
    throw new Error(error?.error?.message ?? `the server answered ${reply.status}`);
  }
}

let asking = null; // several requests share one dialog
function askForToken(wrong) {
  asking ??= new Promise((done) => {
    const dialog = find("token-dialog");
    find("token-wrong").hidden = !wrong;
    find("token").value = "";
    dialog.onclose = () => {
      asking = null;
      sessionStorage.setItem("token", find("token").value);
      done();
    };
    dialog.oncancel = (event) => event.preventDefault();
    dialog.showModal();
  });
  return asking;
}

/** The data of a stream's events, parsed. */
async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines.filter((x) => x.startsWith("data: "))) {
      const data = line.slice("data: ".length);
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

// What is asked

/** The task's prompt with the columns' texts, as Python's str.format fills it. */
function fill(template, texts) {
  return template.replace(/{{|}}|{(\w+)}/g, (whole, name) => (name ? texts[name] : whole[0]));
}

function setUpForm() {
  find("about").textContent = about.model + (about.task ? ` · task ${about.task}` : "");
  document.title = `${about.model} · jaxfusion`;
  document.querySelector(".bridge .name").textContent = about.model;
  document.querySelector(".llm .name").textContent = about.beside;
  document.querySelector(".llm").hidden = !about.llm;
  for (const name of about.columns) {
    const area = make("textarea", { name, dir: "auto", rows: 3, required: true });
    area.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) find("ask").requestSubmit();
    });
    find("columns").append(make("label", {}, make("span", { textContent: name }), area));
  }
  if (about.languages) {
    find("language").append(...about.languages.map((x) => make("option", { textContent: x })));
    find("language-row").hidden = false;
  }
  for (const example of about.examples) {
    const chip = make("button", {
      type: "button", className: "quiet", textContent: example.name, lang: example.language,
      dir: "auto",
    });
    chip.addEventListener("click", () => show(example));
    find("chips").append(chip);
  }
  find("examples").hidden = !about.examples.length;
}

function show(example) {
  find("ask").querySelectorAll("textarea").forEach((area, i) => {
    area.value = example.columns[i];
    area.lang = example.language;
  });
  if (about.languages) find("language").value = example.told;
}

// What is answered

async function run(event) {
  event.preventDefault();
  running?.abort();
  const controller = (running = new AbortController());
  const areas = [...find("ask").querySelectorAll("textarea")];
  const texts = Object.fromEntries(areas.map((area) => [area.name, area.value.trim()]));
  const asked = { text: fill(about.prompt, texts), signal: controller.signal };
  asked.language = about.languages ? find("language").value : undefined;
  setBusy(true);
  find("error").hidden = find("layers").hidden = true;
  const cards = [answer(".bridge", about.model, asked)];
  if (about.llm) cards.push(answer(".llm", about.llm, { ...asked, language: undefined }));
  await Promise.all(cards);
  if (running === controller) setBusy(false);
}

function setBusy(busy) {
  find("stop").disabled = !busy;
  document.body.setAttribute("aria-busy", busy);
}

/** Fills a model's card: the answer as it comes, then the labels and, of a bridge, the layers. */
async function answer(place, model, asked) {
  const card = document.querySelector(place);
  const [text, note] = [card.querySelector(".answer"), card.querySelector(".note")];
  text.textContent = note.textContent = "";
  card.querySelector(".bars").hidden = true;
  text.classList.add("waiting");
  try {
    note.textContent = await stream(text, model, asked);
    const body = { model, text: asked.text, language: asked.language };
    const found = await (await request("api/explain", body, asked.signal)).json();
    drawBars(card.querySelector(".bars"), found.labels);
    if (found.fusion) drawLayers(found); // an LLM alone has none
  } catch (error) {
    if (asked.signal.aborted) {
      note.textContent ||= "stopped";
    } else {
      find("error").textContent = error.message;
      find("error").hidden = false;
    }
  } finally {
    text.classList.remove("waiting");
  }
}

/** Streams an answer into an element; returns what it took. */
async function stream(text, model, asked) {
  const begun = performance.now();
  const number = (id) => (find(id).value === "" ? undefined : Number(find(id).value));
  const reply = await request("v1/chat/completions", {
    model, messages: [{ role: "user", content: asked.text }], language: asked.language,
    max_tokens: number("most"), temperature: number("temperature"), seed: number("seed"),
    stream: true, stream_options: { include_usage: true },
  }, asked.signal);
  let tokens = 0;
  for await (const event of events(reply)) {
    if (event.error) throw new Error(event.error.message);
    tokens = event.usage?.completion_tokens ?? tokens;
    text.append(event.choices[0]?.delta.content ?? "");
  }
  text.classList.remove("waiting");
  const seconds = ((performance.now() - begun) / 1000).toFixed(1);
  return `${text.textContent ? "" : "an empty answer · "}${tokens} token${tokens === 1 ? "" : "s"} · ${seconds} s`;
}

/** A label that may break after its slashes. */
function breakable(label) {
  return label.split(/(?<=\/)/).flatMap((part, i) => (i ? [make("wbr"), part] : [part]));
}

function drawBars(table, labels) {
  table.tBodies[0].replaceChildren(...labels.map(({ label, probability }) => {
    const fillOf = make("i");
    fillOf.style.setProperty("--share", probability);
    const bar = make("div", {}, make("span", { className: "track" }, fillOf),
      make("b", { textContent: percent(probability) }));
    return make("tr", {}, make("th", { scope: "row", dir: "auto" }, ...breakable(label)),
      make("td", { className: "bar" }, bar));
  }));
  table.hidden = !labels.length;
}

/** The heat map is a table: its numbers are there for screen readers, on hover, or for all. */
function drawLayers({ tokens, weights, fusion }) {
  find("layers").hidden = false;
  const none = !weights;
  find("numbers").hidden = find("heat").hidden = none;
  find("readout").textContent = "";
  if (none) {
    find("layers-note").textContent = `The fusion '${fusion}' reads a single layer.`;
    return;
  }
  const most = Math.max(...weights.flat());
  const same = fusion === "global_softmax" ? " This fusion has the same weights for all tokens." : "";
  find("layers-note").textContent = "The weight of each layer in what the LLM gets of a token, in %." +
    `${same} The strongest cell is ${percent(most)}. Point at a cell for its number.`;
  const layers = weights[0].map((_, i) => make("th", {
    scope: "col", textContent: i + 1, ariaLabel: `layer ${i + 1}` }));
  const head = make("tr", {}, make("th", { scope: "col", textContent: "token" }), ...layers);
  const rows = tokens.map((token, i) => make("tr", {},
    make("th", { scope: "row", dir: "auto", textContent: token, title: token }),
    ...weights[i].map((weight, layer) => cell(token, layer + 1, weight, most))));
  find("heat").replaceChildren(make("thead", {}, head), make("tbody", {}, ...rows));
}

function cell(token, layer, weight, most) {
  const number = make("span", {
    className: numbersShown() ? "" : "hidden-text", textContent: (100 * weight).toFixed(1) });
  const td = make("td", { title: `${token} · layer ${layer} · ${percent(weight)}` }, number);
  td.style.setProperty("--share", weight / most);
  td.classList.toggle("strong", weight / most > 0.75);
  td.addEventListener("mouseenter", () => {
    find("readout").replaceChildren(
      make("bdi", { textContent: token }), ` · layer ${layer} · ${percent(weight)}`);
  });
  return td;
}

function numbersShown() {
  return find("numbers").ariaPressed === "true";
}

function toggleNumbers() {
  const shown = !numbersShown();
  find("numbers").ariaPressed = shown;
  find("numbers").textContent = shown ? "Hide numbers" : "Show numbers";
  find("heat").querySelectorAll("td span").forEach((x) => {
    x.classList.toggle("hidden-text", !shown);
  });
}

// Light and dark

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  find("theme").textContent = theme === "dark" ? "Light" : "Dark"; // what it changes to
}

function setUpTheme() {
  const system = matchMedia("(prefers-color-scheme: dark)");
  setTheme(localStorage.getItem("theme") ?? (system.matches ? "dark" : "light"));
  find("theme").addEventListener("click", () => {
    const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    localStorage.setItem("theme", theme);
    setTheme(theme);
  });
}

async function start() {
  setUpTheme();
  find("base").textContent = new URL("v1", location.href).href;
  find("ask").addEventListener("submit", run);
  find("stop").addEventListener("click", () => running?.abort());
  find("numbers").addEventListener("click", toggleNumbers);
  try {
    about = await (await request("api/about")).json();
    setUpForm();
    if (about.examples.length) show(about.examples[0]);
  } catch (error) {
    find("about").textContent = "";
    find("error").textContent = error.message;
    find("error").hidden = false;
  }
}

start();
