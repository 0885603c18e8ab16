// The conversation and the map of experts. Whatever came from a model goes into the page by textContent only.
(() => {
  "use strict";
  const root = document.documentElement;
  const by = (id) => document.getElementById(id);
  const make = (name, text, parent, kind) => {
    const element = document.createElement(name);
    if (text !== undefined && text !== null) element.textContent = text;
    if (kind) element.className = kind;
    if (parent) parent.append(element);
    return element;
  };
  const many = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;

  // --- theme: what the system says, until the button says otherwise
  const themes = ["auto", "light", "dark"];
  const stored = () => { try { return localStorage.getItem("moesmith-theme"); } catch { return null; } };
  const setTheme = (theme) => {
    if (theme === "auto") delete root.dataset.theme; else root.dataset.theme = theme;
    by("theme").textContent = `Theme: ${theme}`;
  };
  const theme = () => root.dataset.theme || "auto";
  const wanted = new URLSearchParams(location.search).get("theme") || stored();
  setTheme(themes.includes(wanted) ? wanted : "auto");
  by("theme").addEventListener("click", () => {
    setTheme(themes[(themes.indexOf(theme()) + 1) % 3]);
    try { localStorage.setItem("moesmith-theme", theme()); } catch { /* storage may be off */ }
    draw();
  });

  // --- on a narrow screen one of the two is shown
  const show = (view) => {
    document.body.dataset.view = view;
    by("view-chat").setAttribute("aria-pressed", String(view === "chat"));
    by("view-map").setAttribute("aria-pressed", String(view === "map"));
    if (view === "map") { catchUp(); draw(); }
  };
  by("view-chat").addEventListener("click", () => show("chat"));
  by("view-map").addEventListener("click", () => show("map"));
  const mapInSight = () => by("map").offsetParent !== null || getComputedStyle(by("map")).display !== "none";

  // --- asking the server
  const headers = () => {
    const key = by("key").value.trim();
    return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  };
  const refusal = async (response) => {
    let words = "";
    try { words = (await response.json()).error.message; } catch { /* not ours */ }
    if (response.status === 401) {
      by("key-field").hidden = false; by("settings").open = true; by("key").focus();
      words = by("key").value ? "The server does not accept this API key." : "This server wants an API key.";
    }
    const wait = response.headers.get("Retry-After");
    if (response.status === 429 && wait) words = `${words || "The server is busy."} Try again in ${wait} s.`;
    return words || `The server answered ${response.status} ${response.statusText}`;
  };
  const unreachable = (error) => error instanceof TypeError ? "The server cannot be reached, or the connection broke." : String(error.message || error);

  const loadModels = async () => {
    const select = by("model");
    try {
      const response = await fetch("v1/models", { headers: headers() });
      if (!response.ok) throw new Error(await refusal(response));
      const names = (await response.json()).data.map((model) => model.id), kept = select.value;
      select.replaceChildren(...names.map((name) => { const option = make("option", name); option.value = name; return option; }));
      if (names.includes(kept)) select.value = kept;
      select.disabled = names.length === 0;
      by("alert").textContent = "";
    } catch (error) { by("alert").textContent = unreachable(error); }
  };
  by("key").addEventListener("change", loadModels);

  // --- settings
  const settled = () => {
    const t = Number(by("temperature").value);
    by("temperature-value").textContent = t === 0 ? "0, always the likeliest token" : t.toFixed(1);
    by("settings-short").textContent = `· temperature ${t.toFixed(1)} · up to ${maxTokens()} tokens${by("system").value.trim() ? " · system message" : ""}`;
  };
  const maxTokens = () => Math.max(1, Math.floor(Number(by("max-tokens").value)) || 512);
  ["temperature", "max-tokens", "system"].forEach((id) => by(id).addEventListener("input", settled));
  by("fields").addEventListener("submit", (event) => { event.preventDefault(); by("settings").open = false; });

  // --- conversation: turns hold what was said and where it stands on the page
  let turns = [], running = null;

  const addTurn = (role, who, content) => {
    by("empty").hidden = true;
    const box = make("div", null, by("log"), `turn ${role}`);
    make("p", who, box, "who");
    const thoughts = make("details", null, box); thoughts.hidden = true;
    make("summary", "Reasoning", thoughts);
    const turn = { role, content, reasoning: "", box, thoughts, thought: make("div", "", thoughts, "text"), text: make("div", content, box, "text"), facts: make("p", null, box, "facts") };
    turn.text.dir = "auto";
    turns.push(turn);
    return turn;
  };
  const atEnd = () => { const log = by("log"); return log.scrollHeight - log.scrollTop - log.clientHeight < 60; };
  const toEnd = () => { by("log").scrollTop = by("log").scrollHeight; };
  const busy = (on) => {
    by("send").hidden = on; by("stop").hidden = !on; by("new").disabled = on;
    by("log").setAttribute("aria-busy", String(on));
  };

  const messages = (until) => {
    const system = by("system").value.trim(), said = [];
    for (const turn of turns) {
      if (turn === until) break;
      if (!turn.failed) said.push({ role: turn.role, content: turn.content });
    }
    return system ? [{ role: "system", content: system }, ...said] : said;
  };

  const events = async function* (response) {
    const reader = response.body.getReader(), decoder = new TextDecoder();
    let held = "";
    for (;;) {
      const { done, value } = await reader.read();
      held += done ? decoder.decode() : decoder.decode(value, { stream: true });
      const lines = held.split(/\r\n|\n|\r(?!$)/);
      held = done ? "" : lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") return true;
        if (data) yield JSON.parse(data);
      }
      if (done) return false;
    }
  };

  const take = (turn, event) => {
    if (event.error) throw new Error(event.error.message || "The server stopped the reply.");
    if (event.id) turn.id = event.id;
    if (event.usage) turn.usage = event.usage;
    for (const choice of event.choices || []) {
      const delta = choice.delta || {}, follow = atEnd();
      if (delta.content) { turn.content += delta.content; turn.text.append(delta.content); turn.pieces += 1; }
      if (delta.reasoning_content) {
        turn.reasoning += delta.reasoning_content; turn.thoughts.hidden = false; turn.thought.append(delta.reasoning_content); turn.pieces += 1;
      }
      for (const call of delta.tool_calls || []) {
        const words = call.function || {}, said = `${words.name || ""}${words.arguments || ""}`;
        turn.content += said; turn.text.append(said);
      }
      if (choice.finish_reason) turn.finish = choice.finish_reason;
      if (follow) toEnd();
    }
  };

  const closing = (turn, seconds) => {
    const tokens = turn.usage ? turn.usage.completion_tokens : turn.pieces;
    const words = [`${many(tokens, "token")}${turn.usage ? "" : " or more"}`];
    // Counted from the first token on, so that the wait for it is no part of the rate.
    if (tokens > 1 && seconds > 0) words.push(`${((tokens - 1) / seconds).toFixed(1)} tokens/s`);
    if (turn.stopped) words.push("stopped");
    else if (turn.finish === "length") words.push("cut at the longest reply");
    return words.join(" · ");
  };

  const finish = (turn, seconds, wrong) => {
    turn.box.classList.remove("busy");
    turn.facts.replaceChildren();
    if (wrong) make("span", wrong, turn.facts, "wrong");
    if (turn.content || turn.reasoning) make("span", closing(turn, seconds), turn.facts);
    if (turn.id && !wrong && (turn.content || turn.reasoning)) {
      const look = make("button", "Experts", turn.facts);
      look.type = "button"; look.title = "Show the experts of this reply";
      look.addEventListener("click", () => { show("map"); loadMap(turn); });
    }
    if (turn === turns[turns.length - 1]) {
      const again = make("button", "Try again", turn.facts);
      again.type = "button";
      again.addEventListener("click", () => { if (!running) { turn.box.remove(); turns = turns.filter((other) => other !== turn); reply(); } });
    }
  };

  const reply = async () => {
    const model = by("model").value;
    turns.forEach((turn) => turn.facts.querySelectorAll("button").forEach((button) => { if (button.textContent === "Try again") button.remove(); }));
    const turn = addTurn("assistant", model, "");
    turn.pieces = 0; turn.box.classList.add("busy"); toEnd(); busy(true);
    running = new AbortController();
    const mine = running, body = {
      model, messages: messages(turn), temperature: Number(by("temperature").value), max_tokens: maxTokens(),
      stream: true, stream_options: { include_usage: true },
    };
    const started = performance.now();
    let first = 0, wrong = "";
    try {
      const response = await fetch("v1/chat/completions", { method: "POST", headers: headers(), body: JSON.stringify(body), signal: mine.signal });
      if (!response.ok) throw new Error(await refusal(response));
      const stream = events(response);
      for (;;) {
        const { done, value } = await stream.next();
        if (done) { if (!value && !turn.finish) wrong = "The connection broke before the reply was whole."; break; }
        take(turn, value);
        if (!first && turn.pieces) first = performance.now();
      }
    } catch (error) {
      if (mine.signal.aborted) turn.stopped = true; else wrong = unreachable(error);
    }
    running = null; busy(false);
    turn.failed = Boolean(wrong) || !turn.content;
    const follow = atEnd();
    finish(turn, (performance.now() - (first || started)) / 1000, wrong);
    if (follow) toEnd();
    by("prompt").focus({ preventScroll: true });
    if (!wrong && turn.id && turn.content && by("follow").checked) {
      latest = turn;
      if (mapInSight()) catchUp();
    }
  };

  const grow = () => { const box = by("prompt"); box.style.height = "auto"; box.style.height = `${box.scrollHeight + 2}px`; };
  by("prompt").addEventListener("input", grow);
  by("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); by("form").requestSubmit(); }
  });
  by("form").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = by("prompt").value.trim();
    if (!text || running) return;
    if (by("model").disabled) { loadModels(); return; }
    // A message without a reply would stand before this one: two of a user in a row are refused by many templates.
    while (turns.length && turns[turns.length - 1].failed) { turns.pop().box.remove(); if (turns.length) turns.pop().box.remove(); }
    addTurn("user", "You", text);
    by("prompt").value = ""; grow(); toEnd();
    reply();
  });
  by("stop").addEventListener("click", () => running && running.abort());
  addEventListener("keydown", (event) => { if (event.key === "Escape" && running && !by("map").contains(event.target)) running.abort(); });
  by("new").addEventListener("click", () => {
    turns.forEach((turn) => turn.box.remove());
    turns = []; latest = null; by("empty").hidden = false; by("prompt").focus();
  });

  // --- map: layers by experts, of all tokens or of one
  const STOPS = ["#440154", "#453781", "#33638d", "#238a8d", "#29af7f", "#94d840", "#fde725"].map((hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)));
  const colour = (t) => {
    const at = Math.max(0, Math.min(1, t)) * (STOPS.length - 1), i = Math.min(Math.floor(at), STOPS.length - 2);
    return `rgb(${STOPS[i].map((c, k) => Math.round(c + (STOPS[i + 1][k] - c) * (at - i))).join()})`;
  };
  let data = null, latest = null, shown = null, cell = { w: 10, h: 12 }, at = null, held = false, token = null, asked = 0;

  const catchUp = () => { if (latest && latest !== shown) loadMap(latest); };
  const loadMap = async (turn) => {
    const ticket = ++asked;
    by("map-said").textContent = "Reading the reply once more to see its experts…";
    try {
      if (!turn.map) {
        const response = await fetch(`moesmith/experts/${encodeURIComponent(turn.id)}`, { headers: headers() });
        if (!response.ok) throw new Error(response.status === 404 ? "The server no longer keeps this reply." : await refusal(response));
        turn.map = await response.json();
      }
      if (ticket !== asked) return; // a later reply was asked for meanwhile
      shown = turn; data = turn.map; at = null; held = false; token = null;
      by("map-body").hidden = false;
      setUp();
    } catch (error) { if (ticket === asked) by("map-said").textContent = unreachable(error); }
  };

  const short = (name, i) => { const found = /(?:^|\.)(\d+)(?:\.|$)/.exec(name); return found ? found[1] : String(i); };
  const percent = (x) => `${(100 * x).toFixed(x > 0 && x < 0.1 ? 1 : 0)}\u00a0%`;
  const setUp = () => {
    const total = data.tokens.length;
    let best = { share: -1 }, ties = 0, idle = 0, cells = 0;
    data.counts.forEach((row, layer) => row.forEach((n, expert) => {
      cells += 1; idle += n === 0;
      if (n / total > best.share) { best = { share: n / total, layer, expert }; ties = 0; } else if (n / total === best.share) ties += 1;
    }));
    const ks = [...new Set(data.top_k)];
    by("map-said").textContent = `${many(data.layers.length, "layer")} × ${data.experts} experts, ${ks.length === 1 ? `top-${ks[0]}` : `top-${Math.min(...ks)} to ${Math.max(...ks)}`}, over ${many(total, "token")}. ` +
      `Busiest: expert ${best.expert} of layer ${short(data.layers[best.layer], best.layer)}${ties ? ` and ${many(ties, "other")}` : ""}, ${percent(best.share)} of the tokens; even use would be ${percent(data.top_k[best.layer] / data.counts[best.layer].length)}. ` +
      (idle ? `${percent(idle / cells)} of the experts got none.` : "Every expert got some.");
    const list = by("tokens");
    list.replaceChildren(...data.tokens.map((piece, i) => {
      const span = make("span", String(piece).replace(/\n/g, "⏎\n") || "∅");
      span.id = `token-${i}`; span.dataset.i = i; span.setAttribute("role", "option"); span.setAttribute("aria-selected", "false");
      if (i >= data.chosen_tokens) span.className = "far";
      return span;
    }));
    by("table").open = false;
    pick(null); draw();
  };

  // What each cell shows: null is "no token".
  const value = (layer, expert) => {
    if (token !== null) return data.chosen[layer][token].includes(expert) ? 1 : null;
    const n = data.counts[layer][expert];
    if (!n) return null;
    return by("statistic").value === "share" ? n / data.tokens.length : data.weights[layer][expert];
  };

  const draw = () => {
    if (!data || !mapInSight()) return;
    const canvas = by("heat"), rows = data.layers.length, columns = data.experts;
    const coarse = matchMedia("(pointer: coarse), (max-width: 640px)").matches;
    cell.w = Math.max(coarse ? 11 : 3.5, Math.min(40, by("scroll").clientWidth / columns));
    cell.h = Math.max(coarse ? 14 : 8, Math.min(24, 380 / rows));
    const width = Math.floor(cell.w * columns), height = Math.ceil(cell.h * rows), dots = Math.min(devicePixelRatio || 1, 2);
    canvas.width = width * dots; canvas.height = height * dots;
    canvas.style.width = by("ticks").style.width = `${width}px`; canvas.style.height = `${height}px`;
    const c = canvas.getContext("2d"), css = getComputedStyle(canvas), chosen = css.color, edge = css.borderTopColor;
    c.setTransform(dots, 0, 0, dots, 0, 0); c.clearRect(0, 0, width, height);
    let high = 0;
    const values = data.counts.map((row, layer) => row.map((_, expert) => { const v = value(layer, expert); if (v > high) high = v; return v; }));
    values.forEach((row, layer) => row.forEach((v, expert) => {
      const x = expert * cell.w, y = layer * cell.h, w = cell.w - (cell.w > 9 ? 1 : 0.5), h = cell.h - 1;
      if (v === null && cell.w < 6) { c.globalAlpha = 0.2; c.fillStyle = edge; c.fillRect(x, y, w, h); c.globalAlpha = 1; return; }
      if (v === null) { c.globalAlpha = 0.45; c.strokeStyle = edge; c.lineWidth = 1; c.strokeRect(x + 0.5, y + 0.5, w - 1, h - 1); c.globalAlpha = 1; return; }
      c.fillStyle = token !== null ? chosen : colour(high ? v / high : 0);
      c.fillRect(x, y, w, h);
    }));
    if (at) {
      const x = at.expert * cell.w, y = at.layer * cell.h, w = cell.w - 1, h = cell.h - 1;
      c.lineWidth = 4; c.strokeStyle = "#111"; c.strokeRect(x, y, w, h); c.lineWidth = 2; c.strokeStyle = "#ff6fd8"; c.strokeRect(x, y, w, h);
    }
    const every = Math.max(1, Math.ceil(11 / cell.h));
    by("rows").replaceChildren(...data.layers.map((name, i) => { const span = make("span", i % every ? "" : short(name, i)); span.style.height = `${cell.h}px`; return span; }));
    const step = [1, 2, 4, 8, 16, 32, 64].find((n) => n * cell.w >= 24) || 128;
    by("ticks").replaceChildren(...Array.from({ length: Math.ceil(columns / step) }, (_, i) => { const span = make("span", i * step); span.style.left = `${(i * step + 0.5) * cell.w}px`; return span; }));
    const share = by("statistic").value === "share";
    by("none").textContent = token !== null ? "not chosen" : "no token";
    by("low").textContent = "0";
    by("high").textContent = token !== null ? "" : share ? percent(high) : high.toFixed(3);
    by("bar").hidden = by("low").hidden = token !== null;
    canvas.setAttribute("aria-label", `${share ? "Share of tokens" : "Mean routing weight"} by layer and expert. ${by("map-said").textContent}`);
  };

  // --- one expert: what it got, and which tokens
  const said = (layer, expert) => {
    const n = data.counts[layer][expert], total = data.tokens.length;
    const where = `Layer ${short(data.layers[layer], layer)}, expert ${expert}: `;
    if (n === undefined) return `${where}this layer has only ${data.counts[layer].length} experts.`;
    if (!n) return `${where}no token.`;
    return `${where}${n} of ${many(total, "token")} (${percent(n / total)}), mean routing weight ${data.weights[layer][expert].toFixed(3)}.`;
  };
  const look = (place) => {
    at = place;
    by("tip").textContent = place ? said(place.layer, place.expert) : token !== null ? tokenSaid() : "";
    [...by("tokens").children].forEach((span, i) => {
      span.classList.toggle("on", Boolean(place) && i < data.chosen_tokens && data.chosen[place.layer][i].includes(place.expert));
    });
    draw();
  };
  const under = (event) => {
    const box = by("heat").getBoundingClientRect();
    const layer = Math.floor((event.clientY - box.top) / cell.h), expert = Math.floor((event.clientX - box.left) / cell.w);
    return layer >= 0 && layer < data.layers.length && expert >= 0 && expert < data.counts[layer].length ? { layer, expert } : null;
  };
  by("heat").addEventListener("pointermove", (event) => { if (!held && event.pointerType === "mouse") look(under(event)); });
  by("heat").addEventListener("pointerleave", (event) => { if (!held && event.pointerType === "mouse") look(null); });
  by("heat").addEventListener("click", (event) => {
    const place = under(event), same = held && at && place && at.layer === place.layer && at.expert === place.expert;
    held = Boolean(place) && !same; look(same ? null : place);
  });
  by("scroll").addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (moves && data) {
      event.preventDefault();
      const from = at || { layer: 0, expert: 0 }, clamp = (x, n) => Math.max(0, Math.min(n - 1, x));
      const layer = at ? clamp(from.layer + moves[0], data.layers.length) : 0;
      held = true;
      look({ layer, expert: at ? clamp(from.expert + moves[1], data.counts[layer].length) : 0 });
      const x = at.expert * cell.w, box = by("scroll");
      if (x < box.scrollLeft) box.scrollLeft = x; else if (x + cell.w > box.scrollLeft + box.clientWidth) box.scrollLeft = x + cell.w - box.clientWidth;
    } else if (event.key === "Enter") held = Boolean(at);
    else if (event.key === "Escape") { held = false; look(null); }
  });

  // --- one token: its experts in every layer
  const tokenSaid = () => `Token ${token + 1} of ${data.tokens.length}, “${String(data.tokens[token]).replace(/\n/g, "⏎")}”: its experts in every layer.`;
  const pick = (i) => {
    token = i;
    [...by("tokens").children].forEach((span, k) => span.setAttribute("aria-selected", String(k === i)));
    if (i === null) by("tokens").removeAttribute("aria-activedescendant"); else by("tokens").setAttribute("aria-activedescendant", `token-${i}`);
    by("all").setAttribute("aria-pressed", String(i === null));
    by("statistic").disabled = i !== null;
    if (!held) at = null;
    look(at);
  };
  const stepTo = (i) => {
    if (!data || !data.chosen_tokens) return;
    fixed = Math.max(0, Math.min(data.chosen_tokens - 1, i)); pick(fixed);
    const span = by(`token-${fixed}`), list = by("tokens");
    if (span.offsetTop < list.scrollTop || span.offsetTop + span.offsetHeight > list.scrollTop + list.clientHeight) list.scrollTop = span.offsetTop - 20;
  };
  let fixed = null; // the token that was clicked or stepped to; pointing shows another for as long as it lasts
  const spanOf = (event) => { const i = event.target.dataset.i; return i === undefined || Number(i) >= data.chosen_tokens ? null : Number(i); };
  by("tokens").addEventListener("pointerover", (event) => { const i = spanOf(event); if (i !== null && event.pointerType === "mouse") pick(i); });
  by("tokens").addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") pick(fixed); });
  by("tokens").addEventListener("click", (event) => { const i = spanOf(event); if (i !== null) { fixed = fixed === i ? null : i; pick(fixed); } });
  by("tokens").addEventListener("keydown", (event) => {
    const move = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (move) { event.preventDefault(); stepTo(token === null ? 0 : token + move); }
    else if (event.key === "Home") { event.preventDefault(); stepTo(0); }
    else if (event.key === "End") { event.preventDefault(); stepTo(Infinity); }
    else if (event.key === "Escape") { fixed = null; pick(null); }
  });
  by("after").addEventListener("click", () => stepTo(token === null ? 0 : token + 1));
  by("before").addEventListener("click", () => stepTo(token === null ? 0 : token - 1));
  by("all").addEventListener("click", () => { fixed = null; held = false; at = null; pick(null); });
  by("statistic").addEventListener("change", () => { by("table").open = false; draw(); });
  by("follow").addEventListener("change", () => { if (by("follow").checked) { latest = [...turns].reverse().find((turn) => turn.role === "assistant" && turn.id && !turn.failed) || latest; catchUp(); } });

  by("table").addEventListener("toggle", () => {
    const box = by("table").querySelector(".scroll");
    box.replaceChildren();
    if (!by("table").open || !data) return;
    const table = make("table", null, box), share = by("statistic").value === "share";
    make("caption", share ? "Tokens sent to each expert" : "Mean routing weight", table, "unseen");
    const head = make("tr", null, make("thead", null, table)), body = make("tbody", null, table);
    make("th", "layer", head).scope = "col";
    for (let expert = 0; expert < data.experts; expert++) make("th", expert, head).scope = "col";
    data.counts.forEach((row, layer) => {
      const line = make("tr", null, body);
      make("th", short(data.layers[layer], layer), line).scope = "row";
      row.forEach((n, expert) => make("td", share ? n : data.weights[layer][expert].toFixed(3), line));
    });
  });
  new ResizeObserver(draw).observe(by("scroll"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

  settled(); loadModels(); by("prompt").focus();
})();
