// The theme button and the heatmap. The page is whole without this file except for the heatmap.
(() => {
  "use strict";
  const root = document.documentElement;
  const by = (id) => document.getElementById(id);
  const make = (name, text, parent) => {
    const element = document.createElement(name);
    if (text !== undefined) element.textContent = text; // never as HTML: names come from files
    if (parent) parent.append(element);
    return element;
  };

  // --- theme: what the system says, until the button says otherwise
  const button = by("theme");
  const themes = ["auto", "light", "dark"];
  const stored = () => { try { return localStorage.getItem("moesmith-theme"); } catch { return null; } };
  const setTheme = (theme) => {
    if (theme === "auto") delete root.dataset.theme; else root.dataset.theme = theme;
    button.textContent = `Theme: ${theme}`;
  };
  const now = () => root.dataset.theme || "auto";
  const asked = new URLSearchParams(location.search).get("theme") || stored();
  setTheme(themes.includes(asked) ? asked : "auto");
  button.hidden = false;
  button.addEventListener("click", () => {
    setTheme(themes[(themes.indexOf(now()) + 1) % 3]);
    try { localStorage.setItem("moesmith-theme", now()); } catch { /* a file page may have no storage */ }
  });

  // --- print: what is folded is opened
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((d) => { d.open = !d.dataset.large; }));

  // --- heatmap
  const store = by("heat-data");
  if (!store) return;
  const data = JSON.parse(store.textContent);
  const DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  const CODES = 4094;
  const canvas = by("heat"), inner = by("heat-inner"), scroll = by("heat-scroll"), tip = by("heat-tip");
  const pick = { statistic: by("heat-statistic"), domain: by("heat-domain"), scale: by("heat-scale"), order: by("heat-order") };
  const cache = new Map();

  const decode = (packed) => packed.rows.map((row) => {
    const values = new Array(row.length / 2);
    for (let i = 0; i < values.length; i++) {
      const code = DIGITS.indexOf(row[2 * i]) * 64 + DIGITS.indexOf(row[2 * i + 1]);
      if (code > CODES) values[i] = null;
      else if (packed.log) values[i] = code ? packed.low * (packed.high / packed.low) ** ((code - 1) / (CODES - 1)) : 0;
      else values[i] = packed.low + (packed.high - packed.low) * code / CODES;
    }
    return values;
  });
  const matrix = (statistic, domain) => {
    const key = `${statistic} ${domain}`;
    if (!cache.has(key)) {
      const packed = data.statistics[statistic].by_domain[domain];
      cache.set(key, packed ? decode(packed) : null);
    }
    return cache.get(key);
  };
  const dropped = data.dropped.map((ids) => new Set(ids));
  const isDropped = (layer, expert) => Boolean(dropped[layer] && dropped[layer].has(expert));
  const format = (x) => {
    if (x === null || x === undefined) return "–";
    if (x === 0) return "0";
    const size = Math.abs(x);
    if (size >= 1e9 || size < 1e-4) return x.toExponential(2).replace("e", " × 10^").replace("+", "").replace(/-/g, "−");
    if (size >= 1000) return Math.round(x).toLocaleString("en");
    return String(Number(x.toPrecision(3))).replace("-", "−");
  };
  const stops = data.colours.map((hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)));
  const colour = (t) => {
    const at = Math.max(0, Math.min(1, t)) * (stops.length - 1), i = Math.min(Math.floor(at), stops.length - 2);
    return `rgb(${stops[i].map((c, k) => Math.round(c + (stops[i + 1][k] - c) * (at - i))).join()})`;
  };

  let rows = [], ranks = [], order = [], cell = { w: 8, h: 14 }, columns = 1, at = null;

  const read = () => {
    rows = matrix(pick.statistic.value, pick.domain.value) || [];
    columns = Math.max(1, ...rows.map((row) => row.length));
    order = []; ranks = [];
    rows.forEach((row) => {
      const sorted = row.map((_, i) => i).sort((a, b) => (row[b] ?? -Infinity) - (row[a] ?? -Infinity) || a - b);
      const rank = new Array(row.length);
      sorted.forEach((expert, place) => { rank[expert] = place; });
      ranks.push(rank);
      order.push(pick.order.value === "value" ? sorted : row.map((_, i) => i));
    });
  };

  const shade = () => {
    const all = rows.flat().filter((v) => v !== null);
    const low = Math.min(0, ...all.length ? [all.reduce((a, b) => Math.min(a, b))] : []);
    const high = all.length ? all.reduce((a, b) => Math.max(a, b)) : 1;
    const scale = pick.scale.value;
    return rows.map((row, layer) => {
      const top = scale === "layer" ? row.reduce((a, b) => Math.max(a, b ?? a), low) : high;
      return row.map((value, expert) => {
        if (value === null) return null;
        if (scale === "rank") return 1 - ranks[layer][expert] / Math.max(1, row.length - 1);
        return top > low ? (value - low) / (top - low) : 0;
      });
    });
  };

  const draw = () => {
    const room = scroll.clientWidth || 320;
    const coarse = matchMedia("(pointer: coarse), (max-width: 640px)").matches;
    cell.w = Math.max(coarse ? 11 : 7.5, Math.min(44, room / columns));
    cell.h = Math.max(coarse ? 16 : 14, Math.min(26, cell.w, 560 / rows.length));
    const width = Math.round(cell.w * columns), height = Math.round(cell.h * rows.length);
    const dots = Math.min(devicePixelRatio || 1, 2);
    inner.style.width = `${width}px`;
    canvas.width = width * dots; canvas.height = height * dots;
    canvas.style.aspectRatio = `${width} / ${height}`;
    const c = canvas.getContext("2d");
    c.setTransform(dots, 0, 0, dots, 0, 0);
    c.clearRect(0, 0, width, height);
    const shades = shade(), gap = cell.w >= 12 ? 1 : 0.5;
    const box = (place, layer) => [place * cell.w, layer * cell.h, cell.w - gap, cell.h - gap];
    rows.forEach((row, layer) => order[layer].forEach((expert, place) => {
      const [x, y, w, h] = box(place, layer), t = shades[layer][expert];
      if (t === null) {
        c.save(); c.beginPath(); c.rect(x, y, w, h); c.clip();
        c.strokeStyle = "#8a929c"; c.lineWidth = 1.2; c.beginPath();
        for (let d = -h; d < w; d += 5) { c.moveTo(x + d, y + h); c.lineTo(x + d + h, y); }
        c.stroke(); c.restore();
      } else { c.fillStyle = colour(t); c.fillRect(x, y, w, h); }
    }));
    rows.forEach((row, layer) => order[layer].forEach((expert, place) => {
      if (!isDropped(layer, expert)) return;
      const [x, y, w, h] = box(place, layer);
      c.lineWidth = 1; c.strokeStyle = "#111"; c.strokeRect(x + 0.5, y + 0.5, w - 1, h - 1);
      c.lineWidth = 1.6; c.strokeStyle = "#fff"; c.strokeRect(x + 1.6, y + 1.6, w - 3.2, h - 3.2);
    }));
    if (at && rows[at.layer] && at.place < rows[at.layer].length) {
      const [x, y, w, h] = box(at.place, at.layer);
      c.lineWidth = 4; c.strokeStyle = "#111"; c.strokeRect(x, y, w, h);
      c.lineWidth = 2; c.strokeStyle = "#ff6fd8"; c.strokeRect(x, y, w, h);
    }
  };

  const labels = () => {
    const names = by("heat-rows"), ticks = by("heat-ticks");
    names.replaceChildren(); ticks.replaceChildren();
    rows.forEach((_, layer) => make("span", String(data.layers[layer] ?? layer), names));
    const step = [1, 2, 4, 8, 16, 32, 64, 128].find((s) => s * cell.w >= 34) || 256;
    for (let i = 0; i < columns; i += step) {
      const tick = make("span", pick.order.value === "value" ? `${i + 1}.` : String(i), ticks);
      tick.style.left = `${100 * (i + 0.5) / columns}%`;
    }
  };

  const legend = () => {
    const statistic = data.statistics[pick.statistic.value], scale = pick.scale.value;
    by("heat-bar").style.background = `linear-gradient(90deg, ${data.colours.join()})`;
    const all = rows.flat().filter((v) => v !== null);
    const low = all.length ? Math.min(0, all.reduce((a, b) => Math.min(a, b))) : 0;
    const high = all.length ? all.reduce((a, b) => Math.max(a, b)) : 0;
    const unit = statistic.unit ? ` ${statistic.unit}` : "";
    by("heat-low").textContent = scale === "rank" ? "last in its layer" : format(low);
    by("heat-high").textContent = scale === "rank" ? "first" : scale === "layer" ? "largest in its layer" : format(high) + unit;
    canvas.setAttribute("aria-label", `Heatmap of ${statistic.label}, ${domainName(pick.domain.value)}: ${rows.length} layers by ${columns} experts, ${format(low)} to ${format(high)}${unit}.`);
  };
  const domainName = (name) => (name === "all" ? "all domains" : name);

  const show = () => {
    tip.replaceChildren();
    if (!at || !rows[at.layer] || at.place >= rows[at.layer].length) { at = null; return; }
    const expert = order[at.layer][at.place], value = rows[at.layer][expert], statistic = data.statistics[pick.statistic.value];
    make("b", `layer ${data.layers[at.layer] ?? at.layer}, expert ${expert}`, tip);
    make("span", `${statistic.label}: ${format(value)}${statistic.unit ? ` ${statistic.unit}` : ""}. `, tip);
    make("span", `Rank ${ranks[at.layer][expert] + 1} of ${rows[at.layer].length}`, tip);
    if (dropped.length) make("span", isDropped(at.layer, expert) ? ", dropped" : ", kept", tip);
    const frame = by("heat-box").getBoundingClientRect(), picture = canvas.getBoundingClientRect();
    const x = picture.left - frame.left + (at.place + 0.5) * picture.width / columns;
    const y = picture.top - frame.top + at.layer * picture.height / rows.length;
    tip.style.left = `${Math.max(0, Math.min(x - tip.offsetWidth / 2, frame.width - tip.offsetWidth))}px`;
    tip.style.top = `${y - tip.offsetHeight - 8 < -30 ? y + picture.height / rows.length + 8 : y - tip.offsetHeight - 8}px`;
  };
  const refresh = () => { read(); draw(); labels(); legend(); show(); detail(); figuresTable(); };

  // All statistics of the chosen expert
  let chosen = null;
  const detail = () => {
    const place = by("heat-detail");
    place.replaceChildren();
    if (!chosen) return;
    const [layer, expert] = chosen, names = data.domains;
    const table = make("table", undefined, place);
    make("span", `Layer ${data.layers[layer] ?? layer}, expert ${expert}${dropped.length ? (isDropped(layer, expert) ? " (dropped)" : " (kept)") : ""}: every statistic`, table.createCaption());
    const head = make("tr", undefined, make("thead", undefined, table));
    ["statistic", ...names.map(domainName)].forEach((name) => { make("th", name, head).scope = "col"; });
    const body = make("tbody", undefined, table);
    Object.entries(data.statistics).forEach(([key, statistic]) => {
      const line = make("tr", undefined, body);
      make("th", statistic.label + (statistic.unit ? ` (${statistic.unit})` : ""), line).scope = "row";
      names.forEach((name) => { const m = matrix(key, name); make("td", format(m && m[layer] ? m[layer][expert] : null), line); });
    });
  };
  // The map as a table, made only when it is opened
  const fold = by("heat-table");
  const figuresTable = () => {
    const place = fold.querySelector("div");
    place.replaceChildren();
    if (!fold.open) return;
    const table = make("table", undefined, place), head = make("tr", undefined, make("thead", undefined, table));
    const statistic = data.statistics[pick.statistic.value];
    make("span", `${statistic.label}${statistic.unit ? `, ${statistic.unit}` : ""}, ${domainName(pick.domain.value)}; × marks dropped experts`, table.createCaption());
    make("th", "layer", head).scope = "col";
    for (let i = 0; i < columns; i++) make("th", String(i), head).scope = "col";
    const body = make("tbody", undefined, table);
    rows.forEach((row, layer) => {
      const line = make("tr", undefined, body);
      make("th", String(data.layers[layer] ?? layer), line).scope = "row";
      row.forEach((value, expert) => make("td", (isDropped(layer, expert) ? "× " : "") + format(value), line));
    });
  };
  fold.addEventListener("toggle", figuresTable);

  const locate = (event) => {
    const box = canvas.getBoundingClientRect();
    const place = Math.floor((event.clientX - box.left) / box.width * columns);
    const layer = Math.floor((event.clientY - box.top) / box.height * rows.length);
    return rows[layer] && place >= 0 && place < rows[layer].length ? { layer, place } : null;
  };
  const move = (to) => { at = to; draw(); show(); };
  const choose = () => { if (at) { chosen = [at.layer, order[at.layer][at.place]]; detail(); } };
  canvas.addEventListener("pointermove", (event) => { if (event.pointerType === "mouse") move(locate(event)); });
  canvas.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") move(null); });
  canvas.addEventListener("click", (event) => { move(locate(event)); choose(); });
  scroll.addEventListener("scroll", show);
  scroll.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (event.key === "Escape") move(null);
    else if (event.key === "Enter" || event.key === " ") { choose(); event.preventDefault(); }
    else if (step) {
      event.preventDefault();
      const from = at || { layer: 0, place: -step[1] }, layer = Math.max(0, Math.min(rows.length - 1, from.layer + step[0]));
      move({ layer, place: Math.max(0, Math.min(rows[layer].length - 1, from.place + step[1])) });
      const x = (at.place + 0.5) * canvas.clientWidth / columns;
      if (x < scroll.scrollLeft + 20 || x > scroll.scrollLeft + scroll.clientWidth - 20) scroll.scrollLeft = x - scroll.clientWidth / 2;
    }
  });
  const domains = () => {
    const here = data.statistics[pick.statistic.value].by_domain, before = pick.domain.value;
    pick.domain.replaceChildren();
    data.domains.filter((name) => here[name]).forEach((name) => { make("option", domainName(name), pick.domain).value = name; });
    pick.domain.value = here[before] ? before : here[data.start.domain] ? data.start.domain : pick.domain.options[0].value;
  };
  Object.entries(data.statistics).forEach(([key, statistic]) => { make("option", statistic.label, pick.statistic).value = key; });
  pick.statistic.value = data.start.statistic;
  pick.statistic.addEventListener("change", () => { domains(); refresh(); });
  [pick.domain, pick.scale, pick.order].forEach((select) => select.addEventListener("change", refresh));
  let width = 0;
  const resized = () => { if (scroll.clientWidth !== width) { width = scroll.clientWidth; draw(); labels(); show(); } };
  new ResizeObserver(() => requestAnimationFrame(resized)).observe(scroll);
  by("heat-app").hidden = false;
  domains();
  refresh();
})();
