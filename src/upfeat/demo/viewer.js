// The viewer: three pictures with a common zoom, a slider, clicks and strokes. Messages of the server
// arrive as props.value and are merged into the state; actions of the visitor are sent as events.
const root = element.querySelector(".uf-viewer");
const $ = (query) => root.querySelector(query);
const $$ = (query) => [...root.querySelectorAll(query)];
const COLOURS = ["#e66101", "#1e78dc", "#009e60"];
const IDLE = { features: "Computing features…", similarity: "No pixel has been clicked yet.", segment: "Nothing has been painted yet.", text: "No text has been given yet." };
const shown = {};  // by mode: { coarse, fine, low, high }
let size = null, mode = "features", brush = 0, strokes = [], stroke = null, busy = false;
let zoom = 1, centre = [0.5, 0.5], cross = null, waiting = false, last = null;
const pending = new Map();  // by kind of request

// ---- state that CSS shows
function choose(group, name, value) {
  root.dataset[name] = value;
  for (const button of group.querySelectorAll("[role=radio]")) {
    const on = button.dataset[name] === String(value);
    button.setAttribute("aria-checked", on);
    button.tabIndex = on ? 0 : -1;
  }
}
function setMode(value) {
  mode = value;
  choose($(".uf-modes"), "mode", value);
  draw();
}
function setLayout(value) {
  choose($(".uf-layouts"), "layout", value);
  draw();
}
function say(text) {
  const error = $(".uf-error");
  error.hidden = !text.error;
  error.textContent = text.error || "";
  if (text.error) error.scrollIntoView({ block: "nearest" });  // on a phone it is below the pictures
  if (text.status) $(".uf-status").textContent = text.status;
  if (text.busy === undefined) return;
  busy = Boolean(text.busy);  // another photograph is on its way; clicks on this one are too late
  root.classList.toggle("uf-busy", busy);
  root.setAttribute("aria-busy", busy);
  if (busy) $(".uf-status").textContent = text.busy;
}
document.addEventListener("upfeat-say", (event) => say(event.detail));

// ---- pictures
function draw() {
  const maps = shown[mode];
  const slider = root.dataset.layout === "slider";
  root.classList.toggle("uf-empty", !maps);
  $(".uf-coarse .uf-name").textContent = slider ? `Coarse ◂ ▸ ${shown.name || "Upsampled"}` : shown.coarse || "Coarse";
  $(".uf-fine .uf-name").textContent = shown.name || "Upsampled";
  if (size) $(".uf-coarse .uf-size").textContent = slider ? `${shown.cells} → ${size.join(" × ")}` : shown.cells;
  if (maps) {
    $(".uf-blocks").src = maps.coarse;
    for (const layer of $$(".uf-layer:not(.uf-blocks)")) layer.src = maps.fine;
  }
  const legend = $(".uf-legend");
  legend.hidden = !maps || maps.low === undefined;
  if (!legend.hidden) {
    const number = (value) => value.toFixed(2).replace("-", "−");
    $(".uf-low").textContent = number(maps.low);
    $(".uf-high").textContent = number(maps.high);
  }
  $("[data-fetch=picture]").disabled = !maps;
  const idle = mode === "segment" && strokes.length ? "Now paint a stroke of another class." : IDLE[mode];
  if (!waiting) $(".uf-status").textContent = maps ? maps.status : idle;
  place();
}
function place() {
  const half = 0.5 / zoom;
  centre = centre.map((value) => Math.min(Math.max(value, half), 1 - half));
  const [x, y] = centre;
  for (const plane of $$(".uf-plane")) {
    plane.style.transform = `translate(${50 - x * zoom * 100}%, ${50 - y * zoom * 100}%) scale(${zoom})`;
  }
  const split = $(".uf-slide input").value / 100;
  // The boundary is given in the frame's coordinates; the plane under it is moved and enlarged.
  const inside = Math.min(Math.max(x + (split - 0.5) / zoom, 0), 1);
  $(".uf-over").style.clipPath = `inset(0 0 0 ${inside * 100}%)`;
  $(".uf-handle").style.left = `${split * 100}%`;
  $(".uf-zoom-value").textContent = `${zoom.toFixed(zoom % 1 ? 1 : 0)}×`;
  root.classList.toggle("uf-zoomed", zoom > 1);
  const mark = $(".uf-cross");
  mark.hidden = !cross;
  if (cross && size) {
    mark.style.left = `${(100 * (cross[1] + 0.5)) / size[1]}%`;
    mark.style.top = `${(100 * (cross[0] + 0.5)) / size[0]}%`;
    mark.style.scale = 1 / zoom;
  }
}
function setZoom(value, at) {
  const next = Math.min(Math.max(value, 1), 12);
  if (at) centre = centre.map((c, i) => at[i] + ((c - at[i]) * zoom) / next);
  zoom = next;
  place();
}
function paint() {
  const canvas = $(".uf-strokes");
  if (!size) return;
  [canvas.height, canvas.width] = size;
  const context = canvas.getContext("2d");
  context.lineCap = context.lineJoin = "round";
  context.lineWidth = Math.max(size[0], size[1]) / 70;
  for (const one of stroke ? [...strokes, stroke] : strokes) {
    context.strokeStyle = COLOURS[one.label];
    context.beginPath();
    one.points.forEach(([y, x], i) => (i ? context.lineTo(x + 0.5, y + 0.5) : context.moveTo(x + 0.5, y + 0.5)));
    if (one.points.length === 1) context.lineTo(one.points[0][1] + 0.51, one.points[0][0] + 0.5);
    context.stroke();
  }
}

// ---- requests: one at a time; of requests made meanwhile, only the last of each kind is sent
function ask(kind, data) {
  if (busy) return;
  if (waiting) { pending.delete(kind); pending.set(kind, data); return; }
  waiting = true;
  root.classList.add("uf-working");
  root.dataset.asked = String(Number(root.dataset.asked || 0) + 1);
  if (kind === "pick") trigger("pick", data);
  else if (kind === "strokes") trigger("strokes", data);
  else if (kind === "prompt") trigger("prompt", data);
  else trigger("fetch", data);
}
function answered() {
  waiting = false;
  root.classList.remove("uf-working");
  root.dataset.answered = String(Number(root.dataset.answered || 0) + 1);
  for (const [kind, data] of pending) { pending.delete(kind); ask(kind, data); return; }
}
// Gradio does not report a full queue; without this check the viewer would wait for ever.
function refused(error) {
  pending.clear();
  say({ error, status: "Nothing was changed.", busy: "" });
  answered();
}
const plainFetch = window.fetch;
window.fetch = async (...request) => {
  const joins = String(request[0]?.url ?? request[0]).includes("/queue/join");
  try {
    const answer = await plainFetch(...request);
    if (joins && !answer.ok) refused("Too many requests are waiting here; try again in a moment.");
    return answer;
  } catch (error) {
    if (joins) refused("The server does not answer; is upfeat demo still running?");
    throw error;
  }
};
function pick(y, x) {
  if (busy) return;
  cross = [y, x];
  if (mode === "segment") {
    strokes.push({ label: brush, points: [[y, x]] });
    paint(); place(); learn();
    return;
  }
  setMode("similarity");
  ask("pick", { y, x });
}
function learn() {
  const labels = new Set(strokes.map((one) => one.label));
  if (labels.size < 2) {
    delete shown.segment;
    pending.delete("strokes");
    $("[data-fetch=head]").disabled = true;
    draw();
    return;
  }
  const rows = new Map();
  for (const one of strokes) {
    one.points.forEach((point, i) => {
      const [y0, x0] = one.points[Math.max(i - 1, 0)];
      const steps = Math.max(Math.abs(point[0] - y0), Math.abs(point[1] - x0), 1);
      for (let s = 0; s <= steps; s++) {
        const y = Math.round(y0 + ((point[0] - y0) * s) / steps), x = Math.round(x0 + ((point[1] - x0) * s) / steps);
        rows.set(y * size[1] + x, [one.label, y, x]);
      }
    });
  }
  ask("strokes", { strokes: [...rows.values()] });
}

// ---- messages of the server
function receive(value) {
  if (!value || !value.kind || value.number === last) return;  // Gradio announces a value more than once
  last = value.number;
  if (value.kind === "error") { say({ error: value.error, status: value.status || "Nothing was changed.", busy: "" }); answered(); return; }
  if (value.kind === "photo") {
    for (const key of Object.keys(shown)) delete shown[key];
    size = value.size;
    strokes = []; stroke = null; cross = null; zoom = 1; centre = [0.5, 0.5]; pending.clear();
    root.style.setProperty("--uf-aspect", `${size[1]} / ${size[0]}`);
    root.style.setProperty("--uf-ratio", size[1] / size[0]);
    for (const base of $$(".uf-base")) base.src = value.photo;
    shown.name = value.name;
    shown.coarse = value.coarse;
    shown.features = { ...value.maps, status: value.status };
    $(".uf-photo .uf-size").textContent = $(".uf-fine .uf-size").textContent = `${size[0]} × ${size[1]}`;
    shown.cells = `${value.grid.join(" × ")} cells`;
    document.dispatchEvent(new CustomEvent("upfeat-photo", { detail: value.sample }));
    const text = $(".uf-modes [data-mode=text]");
    text.hidden = !value.texts;
    $("[data-fetch=head]").disabled = true;
    root.dataset.loaded = String(Number(root.dataset.loaded || 0) + 1);
    say({ busy: "" });
    setMode("features");
    paint();
  } else if (value.kind === "maps") {
    const cleared = value.mode === "segment" && new Set(strokes.map((one) => one.label)).size < 2;
    if (!cleared) {
      shown[value.mode] = { ...value.maps, status: value.status };
      if (value.mode === "segment") $("[data-fetch=head]").disabled = false;
    }
    answered();
    say({});
    draw();  // the visitor may have chosen another mode meanwhile
    return;
  } else if (value.kind === "file") {
    const bytes = Uint8Array.from(atob(value.data), (c) => c.charCodeAt(0));
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([bytes], { type: value.type }));
    link.download = value.name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }
  say({ status: value.status || " " });
  answered();
}
watch("value", () => receive(props.value));

// ---- pointer
function pixel(event, frame) {
  const box = frame.getBoundingClientRect();
  const at = [
    centre[0] + ((event.clientX - box.left) / box.width - 0.5) / zoom,
    centre[1] + ((event.clientY - box.top) / box.height - 0.5) / zoom,
  ];
  const x = Math.min(Math.max(Math.floor(at[0] * size[1]), 0), size[1] - 1);
  const y = Math.min(Math.max(Math.floor(at[1] * size[0]), 0), size[0] - 1);
  return { x, y, at, box };
}
for (const frame of $$(".uf-frame")) {
  let down = null;
  const photo = Boolean(frame.closest(".uf-photo")), compare = Boolean(frame.closest(".uf-coarse"));
  frame.addEventListener("pointerdown", (event) => {
    if (!size || busy || event.button) return;
    const { x, y, box } = pixel(event, frame);
    const split = box.left + ($(".uf-slide input").value / 100) * box.width;
    const grip = compare && root.dataset.layout === "slider" && Math.abs(event.clientX - split) < 24;
    const painting = photo && mode === "segment";
    if (!painting && !grip && zoom === 1 && event.pointerType === "touch") down = { tap: true };
    else frame.setPointerCapture(event.pointerId);
    down = { ...down, x: event.clientX, y: event.clientY, from: [...centre], grip, painting };
    if (painting) { stroke = { label: brush, points: [[y, x]] }; paint(); event.preventDefault(); }
  });
  frame.addEventListener("pointermove", (event) => {
    if (!down) return;
    const { x, y, box } = pixel(event, frame);
    if (down.painting) {
      const last = stroke.points[stroke.points.length - 1];
      if (last[0] !== y || last[1] !== x) { stroke.points.push([y, x]); paint(); }
    } else if (down.grip) {
      $(".uf-slide input").value = Math.min(Math.max((100 * (event.clientX - box.left)) / box.width, 0), 100);
      place();
    } else if (zoom > 1) {
      centre = [down.from[0] - (event.clientX - down.x) / box.width / zoom, down.from[1] - (event.clientY - down.y) / box.height / zoom];
      place();
    }
  });
  frame.addEventListener("pointerup", (event) => {
    if (!down) return;
    const still = Math.hypot(event.clientX - down.x, event.clientY - down.y) < 5;
    const was = down;
    down = null;
    if (was.painting) {
      strokes.push(stroke); stroke = null;
      learn();
    } else if (still && !was.grip && mode !== "segment") {
      const { x, y } = pixel(event, frame);
      pick(y, x);
    }
  });
  frame.addEventListener("pointercancel", () => { down = null; stroke = null; paint(); });
  frame.addEventListener("wheel", (event) => {
    if (!size || !event.ctrlKey) return;  // the wheel alone scrolls the page
    event.preventDefault();
    setZoom(zoom * (event.deltaY < 0 ? 1.2 : 1 / 1.2), pixel(event, frame).at);
  }, { passive: false });
}

// ---- buttons and keys
root.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button || button.disabled) return;
  const data = button.dataset;
  if (data.mode) setMode(data.mode);
  else if (data.layout) setLayout(data.layout);
  else if (data.class) { brush = Number(data.class); choose($(".uf-classes"), "class", data.class); }
  else if (data.zoom) setZoom({ in: zoom * 1.5, out: zoom / 1.5, reset: 1 }[data.zoom]);
  else if (data.do) { if (data.do === "undo") strokes.pop(); else strokes = []; paint(); learn(); }
  else if (data.fetch && size) ask("fetch", { what: data.fetch, mode });
});
root.addEventListener("keydown", (event) => {
  const radio = event.target.closest("[role=radio]");
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  if (radio && step) {
    const all = [...radio.parentElement.querySelectorAll("[role=radio]:not([hidden])")];
    const next = all[(all.indexOf(radio) + step + all.length) % all.length];
    next.focus(); next.click();
    event.preventDefault();
  }
});
$(".uf-photo .uf-frame").addEventListener("keydown", (event) => {
  if (!size) return;
  const by = event.shiftKey ? 1 : Math.max(Math.round(size[0] / 60), 1);
  const move = { ArrowUp: [-by, 0], ArrowDown: [by, 0], ArrowLeft: [0, -by], ArrowRight: [0, by] }[event.key];
  if (move) {
    const [y, x] = cross || [size[0] >> 1, size[1] >> 1];
    cross = [Math.min(Math.max(y + move[0], 0), size[0] - 1), Math.min(Math.max(x + move[1], 0), size[1] - 1)];
    if (zoom > 1) centre = [cross[1] / size[1], cross[0] / size[0]];
    place();
  } else if (event.key === "Enter") {
    cross = cross || [size[0] >> 1, size[1] >> 1];
    pick(...cross);
  } else if (event.key === "+" || event.key === "-") setZoom(event.key === "+" ? zoom * 1.5 : zoom / 1.5);
  else return;
  event.preventDefault();
});
$(".uf-slide input").addEventListener("input", place);
$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const prompt = event.target.elements.prompt.value.trim();
  if (prompt) ask("prompt", { prompt });
});
if (window.matchMedia("(max-width: 720px)").matches) setLayout("slider");
draw();
receive(props.value);
