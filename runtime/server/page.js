// The state of the server, live: asks /morph/v1/state and redraws. No text is ever set as HTML.
"use strict";

const POINT_S = 0.5; // between two points of the charts
const KEPT = 600; // points
const history = [];
const WAIT_MS = 500; // between two looks; a page that nobody sees waits longer

const $ = (id) => document.getElementById(id);
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name);

function el(tag, text = "", className = "") {
  const node = document.createElement(tag);
  node.textContent = text;
  node.className = className;
  return node;
}

function fill(id, children) {
  $(id).replaceChildren(...children);
}

function ms(seconds) {
  if (seconds === null) return "–";
  return seconds >= 10 ? seconds.toFixed(1) + " s" : (seconds * 1000).toFixed(0) + " ms";
}

function bytes(count) {
  return count >= 2 ** 30 ? (count / 2 ** 30).toFixed(1) + " GiB" : (count / 2 ** 20).toFixed(1) + " MiB";
}

function clock(seconds) {
  return new Date(seconds * 1000).toLocaleTimeString([], { hour12: false });
}

function duration(seconds) {
  const minutes = Math.floor(seconds / 60);
  return minutes < 60 ? `${minutes} min ${Math.floor(seconds % 60)} s` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

function row(cells, tag = "td") {
  const line = el("tr");
  line.append(...cells.map(([text, name]) => el(tag, text, name || "")));
  return line;
}

function named(className, text) {
  const node = el("span");
  node.append(el("i", "", className), text);
  return node;
}

const DEPTH = { full: 0, int8: 1, int4: 2 };

function layerState(state, layer) {
  const to = state.swapping[layer];
  const now = state.layers[layer];
  if (to === undefined) return now;
  return DEPTH[to] > DEPTH[now] ? "demoting" : "promoting";
}

function drawHead(state) {
  $("model").textContent = state.model;
  document.title = `${state.model}: rung ${state.rung} of ${state.capacities.length - 1}`;
  const pinned = state.pinned ? ", pinned" : "";
  const ms = (seconds) => Number((seconds * 1e3).toPrecision(3));
  const step = state.predicted_step_s ? `, step ${ms(state.step_s)} ms (predicted ${ms(state.predicted_step_s)})` : "";
  $("status").textContent = `● ${state.status}, rung ${state.rung} of ${state.capacities.length - 1}${pinned}${step}`;
  $("status").className = state.status === "ready" ? "" : "bad";
  const restarts = state.engine_restarts ? `, engine restarts ${state.engine_restarts}` : "";
  $("facts").textContent =
    `policy ${state.policy}, up ${duration(state.uptime_s)}, ${state.device}, ${state.dtype}, MorphServe ${state.version}${restarts}`;
}

function drawLayers(state) {
  const first = [...new Set(state.ladder.map((rung) => rung.layer))];
  const rest = state.layers.map((_, i) => i).filter((i) => !first.includes(i));
  const letters = { full: "F", int8: "8", int4: "4", demoting: "▼", promoting: "▲" };
  const counts = { full: 0, int8: 0, int4: 0, demoting: 0, promoting: 0 };
  fill("map", [...first, ...rest].map((layer) => {
    const now = layerState(state, layer);
    counts[now] += 1;
    const cell = el("span", letters[now], now);
    cell.title = `layer ${layer}: ${now}`;
    return cell;
  }));
  fill("layers", Object.keys(counts).map((name) => named(name, `${letters[name]} ${name} ${counts[name]}`)));
}

function remember(state) {
  const last = history[history.length - 1];
  if (last && state.time - last.time < POINT_S) return;
  const rates = state.tokens_per_s;
  history.push({ time: state.time, used: state.blocks_used, room: state.blocks_capacity, out: rates.generation, prompt: rates.prompt });
  if (history.length > KEPT) history.shift();
}

function chart(id, top, lines) {
  const canvas = $(id);
  const scale = window.devicePixelRatio || 1;
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  canvas.width = width * scale;
  canvas.height = height * scale;
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  const step = width / Math.max(120, history.length);
  const y = (value) => height - 2 - (value / Math.max(top, 1e-9)) * (height - 6);
  for (const { of, name, filled, level, stepped } of lines) {
    pen.beginPath();
    pen.strokeStyle = pen.fillStyle = colour(name);
    pen.setLineDash(level === undefined ? [] : [4, 4]);
    if (level !== undefined) {
      pen.moveTo(0, y(level));
      pen.lineTo(width, y(level));
    } else if (history.length) {
      history.forEach((point, i) => {
        if (stepped && i) pen.lineTo(i * step, y(of(history[i - 1])));
        pen.lineTo(i * step, y(of(point)));
      });
      if (filled) {
        pen.lineTo((history.length - 1) * step, height);
        pen.lineTo(0, height);
        pen.globalAlpha = 0.45;
        pen.fill();
        pen.globalAlpha = 1;
      }
    }
    pen.lineWidth = 1.5;
    if (!filled) pen.stroke();
  }
}

function drawKv(state) {
  chart("kv", state.blocks_max, [
    { of: (p) => p.used, name: "used", filled: true },
    { level: state.blocks_full, name: "dim" },
    { of: (p) => p.room, name: "room", stepped: true },
  ]);
  const grown = (state.blocks_capacity / Math.max(1, state.blocks_full)).toFixed(2);
  fill("kvtext", [
    named("used", `${state.blocks_used} used`),
    named("promoting", `${state.blocks_capacity} now, ${grown}× full precision`),
    el("span", `┄ ${state.blocks_full} at full precision, ${state.blocks_max} at most, ${state.demand} wanted`),
  ]);
}

function drawTraffic(state) {
  const refused = Object.values(state.refused).reduce((a, b) => a + b, 0);
  const reasons = Object.entries(state.refused).map(([name, count]) => `${name} ${count}`).join(", ");
  const hits = state.prefix_hit_rate === null ? "–" : (state.prefix_hit_rate * 100).toFixed(0) + " %";
  const oldest = state.waiting ? `waiting, the oldest ${state.oldest_wait_s.toFixed(1)} s` : "waiting";
  const shown = [[state.running, "running"], [state.waiting, oldest],
    [refused, `refused ${reasons ? `(${reasons})` : ""}`], [state.preemptions, "preempted"], [hits, "prefix hits"]];
  fill("numbers", shown.map(([number, name]) => {
    const node = el("span");
    node.append(el("b", String(number)), " " + name);
    return node;
  }));
  const top = Math.max(1, ...history.map((point) => Math.max(point.out, point.prompt)));
  chart("rate", top, [{ of: (p) => p.out, name: "used", filled: true }, { of: (p) => p.prompt, name: "room" }]);
  fill("ratetext", [
    named("used", `${state.tokens_per_s.generation.toFixed(0)} output tokens/s`),
    named("promoting", `${state.tokens_per_s.prompt.toFixed(0)} prompt tokens/s`),
  ]);
}

function drawMemory(state) {
  const plan = state.memory;
  const weights = (kind) => state.layers.reduce((sum, now, i) => sum + (now === kind ? plan.images[kind][i] : 0), 0);
  const block = plan.page * state.layers.length;
  const free = state.blocks_capacity - state.blocks_used - state.blocks_cached;
  const parts = [["static", "static", plan.static], ["staging", "staging", plan.staging],
    ["full", "full layers", weights("full")], ["int8", "int8 layers", weights("int8")], ["int4", "int4 layers", weights("int4")],
    ["used", "KV used", state.blocks_used * block], ["cached", "KV cached", state.blocks_cached * block],
    ["free", "KV free", Math.max(0, free) * block]].filter((part) => part[2] > 0);
  fill("bar", parts.map(([name, text, size]) => {
    const part = el("span", "", name);
    part.style.flexGrow = size;
    part.title = `${text}: ${bytes(size)}`;
    return part;
  }));
  fill("memory", parts.map(([name, text, size]) => named(name, `${text} ${bytes(size)}`)));
}

function drawLatency(state) {
  const rows = [["TTFT", state.latency.ttft_s, state.slo.ttft_s], ["TPOT", state.latency.tpot_s, state.slo.tpot_s],
    ["E2E", state.latency.e2e_s, null]];
  const head = row([["", "text"], ["p50"], ["p95"], ["p99"], ["objective"]], "th");
  fill("latency", [head, ...rows.map(([name, seen, wanted]) => row([[name, "text"],
    ...["p50", "p95", "p99"].map((key) => {
      const value = seen === null ? null : seen[key];
      const missed = wanted !== null && value !== null && value > wanted;
      return [ms(value) + (missed ? " !" : ""), missed ? "bad" : ""];
    }), [wanted === null ? "–" : "≤ " + ms(wanted)]]))]);
}

function drawLists(state) {
  fill("events", [...state.events].reverse().map((event) =>
    row([[clock(event.time), "dim text"], [event.kind, "text"], [event.text, "wrap"]])));
  const head = row([["ended", "text"], ["prompt"], ["output"], ["lowered"], ["queued"], ["TTFT"], ["TPOT"], ["E2E"], ["end", "text"], ["id", "text"]], "th");
  fill("requests", [head, ...[...state.requests].reverse().map((request) => {
    const output = Object.values(request.output_tokens).reduce((a, b) => a + b, 0);
    const lowered = output ? (1 - (request.output_tokens.full || 0) / output) * 100 : 0;
    return row([[clock(request.time), "dim text"], [request.prompt_tokens], [output], [lowered.toFixed(0) + " %"],
      ...[request.queued_s, request.ttft_s, request.tpot_s, request.e2e_s].map((value) => [ms(value)]),
      [request.finish_reason, "text"], [request.id, "dim text"]]);
  })]);
}

function draw(state) {
  $("view").hidden = false;
  $("login").hidden = true;
  remember(state);
  for (const part of [drawHead, drawLayers, drawKv, drawTraffic, drawMemory, drawLatency, drawLists]) part(state);
}

function away(text) {
  $("status").textContent = text;
  $("status").className = "bad";
}

async function look() {
  try {
    const key = sessionStorage.getItem("morph-api-key");
    const answer = await fetch("/morph/v1/state", { headers: key ? { Authorization: `Bearer ${key}` } : {}, cache: "no-store" });
    if (answer.status === 401) {
      $("login").hidden = false;
      away(key ? "the server does not know this key" : "locked");
    } else if (answer.ok) draw(await answer.json());
    else away(`the server answered ${answer.status}; trying again`);
  } catch (error) {
    away("the server does not answer; trying again");
  }
  setTimeout(look, document.hidden ? 4 * WAIT_MS : WAIT_MS);
}

$("login").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("morph-api-key", $("key").value);
});
look();
