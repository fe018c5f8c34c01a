// Draws the masks of a photograph, shows one of them under the pointer or the focus, and reports clicked points and dragged boxes.
const SVG = "http://www.w3.org/2000/svg";
const frame = element.querySelector(".frame");
const photograph = element.querySelector(".photograph");
const drawing = element.querySelector(".masks");
const status_line = element.querySelector(".status");
const legend = element.querySelector(".legend");
let view = { masks: [] };
let pinned = null; // number of the mask that stays shown
let drag = null; // corner at which a box begins

function make(name, attributes, ...children) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function describe(mask) {
  return "Mask " + mask.number + ": score " + mask.score.toFixed(2) + ", " + mask.area.toLocaleString("en") + " pixels";
}

function light(number) {
  const mask = view.masks.find((one) => one.number === number);
  drawing.classList.toggle("lit", Boolean(mask));
  for (const node of drawing.querySelectorAll(".mask, .tag")) node.classList.toggle("on", Number(node.dataset.number) === number);
  for (const tag of drawing.querySelectorAll(".tag")) {
    const on = mask && tag.classList.contains("on");
    tag.textContent = on ? mask.number + " · " + mask.score.toFixed(2) : tag.dataset.number;
  }
  for (const node of legend.children) {
    const on = Number(node.dataset.number) === number;
    node.classList.toggle("on", on);
    node.setAttribute("aria-selected", on);
  }
  status_line.textContent = mask ? describe(mask) : view.message || "";
}

function pin(number) {
  pinned = pinned === number ? null : number;
  light(pinned);
}

// Sizes of text and of the mark of a point, in pixels of the image, so that they have one size on the screen.
function onScreen(pixels) {
  return (pixels * view.width) / (drawing.clientWidth || view.width);
}

function draw() {
  view = props.value && props.value.picture ? props.value : { masks: [] };
  frame.className = "frame " + (view.picture ? view.mode : "empty");
  photograph.hidden = !view.picture;
  pinned = view.chosen || null;
  drag = null;
  drawing.replaceChildren();
  legend.replaceChildren();
  // The picture fills the column, unless it were taller than the window.
  frame.style.width = view.picture ? "min(100%, calc(66vh * " + view.width / view.height + "))" : "";
  frame.style.aspectRatio = view.picture ? view.width + " / " + view.height : "";
  if (!view.picture) return light(null);
  if (photograph.getAttribute("src") !== view.picture) photograph.src = view.picture;
  photograph.alt = "Photograph " + view.name;
  drawing.setAttribute("viewBox", "0 0 " + view.width + " " + view.height);
  // Large masks lie below small ones, so that the pointer reaches both.
  for (const mask of [...view.masks].sort((a, b) => b.area - a.area)) {
    const group = make("g", { class: "mask " + mask.style, "data-number": mask.number },
      make("path", { class: "fill", d: mask.outline, "fill-rule": "evenodd" }),
      make("path", { class: "halo", d: mask.outline }),
      make("path", { class: "line", d: mask.outline }));
    group.style.setProperty("--mask", mask.colour);
    group.addEventListener("pointerenter", () => { if (!drag) light(mask.number); });
    group.addEventListener("pointerleave", () => { if (!drag) light(pinned); });
    drawing.append(group);
  }
  for (const mask of view.masks) {
    const tag = make("text", { class: "tag", "data-number": mask.number, x: mask.x, y: mask.y }, String(mask.number));
    drawing.append(tag);
    legend.append(entry(mask));
  }
  if (legend.firstChild) legend.firstChild.tabIndex = 0;
  drawPrompt(view.prompt);
  resize();
  light(pinned);
}

function entry(mask) {
  const button = document.createElement("button");
  const swatch = make("svg", { viewBox: "0 0 26 16", class: mask.style, "aria-hidden": "true" },
    make("rect", { class: "fill", x: 3, y: 3, width: 20, height: 10 }),
    make("rect", { class: "halo", x: 3, y: 3, width: 20, height: 10 }),
    make("rect", { class: "line", x: 3, y: 3, width: 20, height: 10 }));
  const number = document.createElement("b");
  swatch.style.setProperty("--mask", mask.colour);
  number.textContent = mask.number;
  button.type = "button";
  button.className = "entry";
  button.tabIndex = -1;
  button.dataset.number = mask.number;
  button.setAttribute("role", "option");
  button.setAttribute("aria-label", describe(mask));
  button.append(swatch, number, mask.score.toFixed(2));
  button.addEventListener("pointerenter", () => light(mask.number));
  button.addEventListener("pointerleave", () => light(pinned));
  button.addEventListener("focus", () => light(mask.number));
  button.addEventListener("blur", () => light(pinned));
  button.addEventListener("click", () => pin(mask.number));
  return button;
}

// One entry of the legend is reached with the tabulator key, the others with the arrow keys.
legend.addEventListener("keydown", (event) => {
  const entries = [...legend.children];
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  const here = entries.indexOf(document.activeElement);
  let next = step ? here + step : { Home: 0, End: entries.length - 1 }[event.key];
  if (here < 0 || next === undefined) return;
  event.preventDefault();
  next = Math.min(Math.max(next, 0), entries.length - 1);
  for (const one of entries) one.tabIndex = -1;
  entries[next].tabIndex = 0;
  entries[next].focus();
});

function drawPrompt(prompt) {
  for (const node of drawing.querySelectorAll(".prompt")) node.remove();
  if (!prompt) return;
  for (const layer of ["under", "over"]) {
    if (prompt.kind === "point") {
      drawing.append(make("circle", { class: "prompt " + layer, cx: prompt.values[0], cy: prompt.values[1], r: onScreen(7) }));
    } else {
      const [x0, y0, x1, y1] = prompt.values;
      drawing.append(make("rect", { class: "prompt " + layer, x: Math.min(x0, x1), y: Math.min(y0, y1),
        width: Math.abs(x1 - x0), height: Math.abs(y1 - y0) }));
    }
  }
}

function resize() {
  for (const tag of drawing.querySelectorAll(".tag")) {
    tag.setAttribute("font-size", onScreen(15));
    tag.style.strokeWidth = onScreen(3);
  }
  for (const mark of drawing.querySelectorAll("circle.prompt")) mark.setAttribute("r", onScreen(7));
}
new ResizeObserver(() => { if (view.picture) resize(); }).observe(drawing);

// Place of the pointer in pixels of the image, inside of it.
function place(event) {
  const area = drawing.getBoundingClientRect();
  const inside = (value, high) => Math.round(Math.min(Math.max(value, 0), high) * 10) / 10;
  return [inside(((event.clientX - area.left) / area.width) * view.width, view.width),
    inside(((event.clientY - area.top) / area.height) * view.height, view.height)];
}

frame.addEventListener("click", (event) => {
  if (!view.picture || view.mode === "box") return;
  if (view.mode === "point") {
    const values = place(event);
    drawPrompt({ kind: "point", values });
    trigger("point", { values });
    return;
  }
  const group = event.target.closest(".mask");
  if (group) pin(Number(group.dataset.number));
  else { pinned = null; light(null); }
});
frame.addEventListener("pointerdown", (event) => {
  if (!view.picture || view.mode !== "box" || !event.isPrimary || event.button) return;
  event.preventDefault();
  frame.setPointerCapture(event.pointerId);
  drag = place(event);
  light(null);
});
frame.addEventListener("pointermove", (event) => {
  if (drag) drawPrompt({ kind: "box", values: [...drag, ...place(event)] });
});
frame.addEventListener("pointerup", (event) => {
  if (!drag) return;
  const values = [...drag, ...place(event)];
  drag = null;
  const far = onScreen(4);
  if (Math.abs(values[2] - values[0]) > far && Math.abs(values[3] - values[1]) > far) trigger("box", { values });
  else drawPrompt(view.prompt);
});
frame.addEventListener("pointercancel", () => { drag = null; drawPrompt(view.prompt); });
photograph.addEventListener("dragstart", (event) => event.preventDefault());

watch("value", draw);
draw();
