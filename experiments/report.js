"use strict";
// Shows the episodes of a report: nothing is drawn before it is asked for, and all text of
// episodes goes in as text.

const PER_PAGE = 25; // episodes
const TURNS = 60; // of an episode at a time
const FILTERS = ["evaluation", "family", "arm", "run", "turn", "use", "outcome"];
const FIELDS = ["evaluation", "family", "arm", "run", "turn", "use", "outcome", "failures", "game"];
const COLUMNS = ["family", "arm", "outcome", "turns", "use", "run", "turn", "failures", "game"];
const counted = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;
const HEADS = { turn: "meta-turn", use: "games", failures: "parse failures" };

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function start(source) {
  const { strings, episodes } = JSON.parse(source.textContent);
  const byId = (name) => document.getElementById(`episode-${name}`);
  const [form, count, list, view] = ["filters", "count", "list", "view"].map(byId);
  const field = (number, name) =>
    name === "turns"
      ? String((episodes[number][1].length - 3) / 4)
      : strings[episodes[number][0][FIELDS.indexOf(name)]];
  let lowered = null; // all texts for the search, made when it is first used
  let found = [];
  let page = 0;

  function control(label, element) {
    form.append(make("label", {}, label, element));
    element.addEventListener("input", () => choose());
    return element;
  }

  const selects = new Map();
  for (const name of FILTERS) {
    const values = [...new Set(episodes.map((_, number) => field(number, name)))];
    if (values.length < 2) continue;
    if (["run", "turn"].includes(name)) values.sort((a, b) => a - b);
    const options = values.map((value) => make("option", { value }, value));
    const select = make("select", { name }, make("option", { value: "" }, "all"), ...options);
    selects.set(name, control(HEADS[name] ?? name, select));
  }
  const failed = control("parse failures", make("input", { type: "checkbox", name: "failures" }));
  const query = control("text", make("input", { type: "search", name: "text", size: "18" }));
  form.addEventListener("submit", (event) => event.preventDefault());

  function matching(text) {
    lowered ??= strings.map((one) => one.toLowerCase());
    return lowered.map((one) => one.includes(text));
  }

  function choose() {
    const text = query.value.toLowerCase();
    const hit = text ? matching(text) : null;
    found = [];
    for (let number = 0; number < episodes.length; number++) {
      const fits = [...selects].every(
        ([name, select]) => !select.value || field(number, name) === select.value,
      );
      if (!fits || (failed.checked && field(number, "failures") === "0")) continue;
      if (!hit || episodes[number][1].some((index) => hit[index])) found.push(number);
    }
    page = 0;
    showList();
  }

  function showList() {
    const pages = Math.max(1, Math.ceil(found.length / PER_PAGE));
    const first = page * PER_PAGE;
    const shown = found.slice(first, first + PER_PAGE);
    const range = shown.length ? `${first + 1} to ${first + shown.length} of ` : "";
    count.textContent = `${range}${counted(found.length, "episode")}`;
    const head = COLUMNS.map((name) => make("th", { scope: "col" }, HEADS[name] ?? name));
    const rows = shown.map((number) => {
      const link = make("a", { href: `#episode=${number}` }, field(number, COLUMNS[0]));
      const cells = COLUMNS.slice(1).map((name) => make("td", {}, field(number, name)));
      return make("tr", {}, make("th", { scope: "row" }, link), ...cells);
    });
    const table = make("table", {}, make("caption", {}, "Episodes"), make("thead", {},
      make("tr", {}, ...head)), make("tbody", {}, ...rows));
    const attributes = { class: "scroll", tabindex: "0", role: "region", "aria-label": "Episodes" };
    const turn = (label, to) => {
      const button = make("button", { type: "button" }, label);
      button.disabled = to < 0 || to >= pages;
      button.addEventListener("click", () => {
        page = to;
        showList();
      });
      return button;
    };
    const pager = make("p", { class: "pager" }, turn("earlier", page - 1), turn("further", page + 1));
    list.replaceChildren(make("div", attributes, table), pager);
  }

  function marked(text) {
    const wanted = query.value.toLowerCase();
    const parts = document.createDocumentFragment();
    const searched = text.toLowerCase();
    let from = 0;
    // lower case can have another length
    while (wanted && searched.length === text.length) {
      const at = searched.indexOf(wanted, from);
      if (at < 0) break;
      parts.append(text.slice(from, at), make("mark", {}, text.slice(at, at + wanted.length)));
      from = at + wanted.length;
    }
    parts.append(text.slice(from));
    return parts;
  }

  // Maps keep their layout, prose is wrapped: a line is drawn when it is mostly signs.
  function isDrawn(line) {
    const signs = line.replace(/\s/g, "");
    return signs.length > 0 && signs.replace(/[\p{L}\p{N}]/gu, "").length > signs.length / 2;
  }

  function observed(text) {
    const shown = document.createDocumentFragment();
    let block = [];
    let drawn = false;
    const flush = () => {
      const map = drawn && block.length > 1;
      const attributes = map ? { class: "map", tabindex: "0" } : { class: "text" };
      if (block.length) shown.append(make(map ? "pre" : "p", attributes, marked(block.join("\n"))));
      block = [];
    };
    for (const line of text.split("\n")) {
      if (isDrawn(line) !== drawn) {
        flush();
        drawn = !drawn;
      }
      block.push(line);
    }
    flush();
    return shown;
  }

  function drawEpisode(number) {
    const [system, final, error, ...turns] = episodes[number][1].map((index) => strings[index]);
    const outcome = field(number, "outcome");
    const tone = { success: "good", "step limit": "", failed: "bad" }[outcome] ?? "bad";
    const title = make("h3", { tabindex: "-1" }, `${field(number, "family")}, ${field(number, "arm")} `,
      make("span", { class: `badge ${tone}` }, outcome));
    const about = `${field(number, "use")} game ${field(number, "game")}, run ${field(number, "run")},`
      + ` meta-turn ${field(number, "turn")}, ${counted(turns.length / 4, "turn")}`;
    const prompt = make("details", {}, make("summary", {}, "system prompt"),
      make("p", { class: "text" }, marked(system)));
    prompt.open = true;
    const steps = make("div", {});
    const more = make("button", { type: "button" }, "more turns");
    let next = 0;
    const showMore = () => {
      for (const last = Math.min(next + TURNS, turns.length / 4); next < last; next++) {
        const [observation, reply, action, failure] = turns.slice(4 * next, 4 * next + 4);
        const acted = failure
          ? make("p", { class: "act" }, make("span", { class: "badge bad" }, `parse failure: ${failure}`))
          : make("p", { class: "act" }, "→ ", marked(action));
        steps.append(make("div", { class: "turn" }, make("p", { class: "step" }, `turn ${next + 1}`),
          observed(observation), make("p", { class: "text reply" }, marked(reply)), acted));
      }
      if (next < turns.length / 4) return;
      more.remove();
      steps.append(make("div", { class: "turn" }, make("p", { class: "step" }, "end"), observed(final)));
      if (error) steps.append(make("p", { class: "text bad" }, error));
    };
    more.addEventListener("click", showMore);
    const article = make("article", {}, title, make("p", { class: "step" }, about), prompt, steps, more);
    showMore();
    return [article, title];
  }

  function open() {
    const asked = /^#episode=(\d+)(?:,(\d+))?$/.exec(location.hash);
    if (!asked) return;
    const numbers = asked.slice(1).filter((one) => one !== undefined).map(Number);
    const there = numbers.filter((number) => number < episodes.length);
    if (!there.length) {
      view.replaceChildren(make("p", {}, "This page holds no such episode."));
    } else {
      const drawn = there.map(drawEpisode);
      view.replaceChildren(...drawn.map(([article]) => article));
      drawn[0][1].focus({ preventScroll: true });
    }
    view.scrollIntoView();
  }

  choose();
  open();
  addEventListener("hashchange", open);
  addEventListener("click", (event) => {
    const link = event.target.closest?.("a");
    if (link?.hash && link.hash === location.hash) open(); // a second time, nothing changes
  });
}

const source = document.getElementById("episodes-data");
if (source) start(source);

// What is folded is printed as well.
addEventListener("beforeprint", () => {
  for (const one of document.querySelectorAll("details")) one.open = true;
});
