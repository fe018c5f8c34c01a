"use strict";
(() => {
  // Okabe and Ito's colours without black; people with any form of colour blindness can tell them apart.
  const COLORS = ["#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7"];
  const PAGE = 24;
  const FILL = 0.42;
  // Objects of fewer pixels of the picture have thin outlines.
  const THIN = 1500;
  const report = read("report");
  const names = report.names;
  const several = names.length > 1;

  function read(id) {
    return JSON.parse(document.getElementById(id).textContent);
  }

  /** An element with properties, and children that are elements or text; nothing is parsed as HTML. */
  function make(tag, properties = {}, ...children) {
    const element = document.createElement(tag);
    for (const [key, value] of Object.entries(properties)) {
      if (key in element && key !== "list") element[key] = value;
      else element.setAttribute(key, value);
    }
    element.append(...children);
    return element;
  }

  // Masks ---------------------------------------------------------------------------------------------------------------------------------

  /** Decodes COCO's compressed RLE: (width * height) bytes of 0 and 1, column by column. */
  function decode(counts, width, height) {
    const bitmap = new Uint8Array(width * height);
    const runs = [];
    let at = 0;
    let position = 0;
    while (at < counts.length) {
      let value = 0;
      let shift = 0;
      let digit;
      do {
        digit = counts.charCodeAt(at++) - 48;
        value |= (digit & 31) << shift;
        shift += 5;
      } while (digit & 32);
      if (digit & 16) value |= -1 << shift;
      if (runs.length > 2) value += runs[runs.length - 2];
      if (runs.length % 2) bitmap.fill(1, position, position + value);
      position += value;
      runs.push(value);
    }
    return bitmap;
  }

  function area(bitmap) {
    let sum = 0;
    for (const value of bitmap) sum += value;
    return sum;
  }

  /** Calls `visit(x, y)` for the pixels of a mask that are at most `thick` pixels (1 or 2) away from a pixel outside it. */
  function outline(bitmap, width, height, thick, visit) {
    for (let x = 0; x < width; x++) {
      for (let y = 0; y < height; y++) {
        const i = x * height + y;
        if (!bitmap[i]) continue;
        const near = (d) =>
          x < d || y < d || x >= width - d || y >= height - d ||
          !bitmap[i - d] || !bitmap[i + d] || !bitmap[i - d * height] || !bitmap[i + d * height];
        if (near(1) || (thick > 1 && near(2))) visit(x, y);
      }
    }
  }

  function rgb(color) {
    return [1, 3, 5].map((i) => parseInt(color.slice(i, i + 2), 16));
  }

  /** Draws filled masks [{bitmap, color, label}] and dashed outlines of objects; larger masks lie below smaller ones. */
  function paint(canvas, width, height, masks, objects, labelled) {
    canvas.width = width;
    canvas.height = height;
    const context = canvas.getContext("2d");
    const image = context.createImageData(width, height);
    const pixels = image.data;
    const ordered = [...masks].sort((a, b) => b.area - a.area);
    for (const { bitmap, color } of ordered) {
      const [r, g, b] = rgb(color);
      for (let x = 0, i = 0; x < width; x++) {
        for (let y = 0; y < height; y++, i++) {
          if (!bitmap[i]) continue;
          const k = 4 * (y * width + x);
          const below = (pixels[k + 3] / 255) * (1 - FILL);
          const alpha = FILL + below;
          pixels[k] = (r * FILL + pixels[k] * below) / alpha;
          pixels[k + 1] = (g * FILL + pixels[k + 1] * below) / alpha;
          pixels[k + 2] = (b * FILL + pixels[k + 2] * below) / alpha;
          pixels[k + 3] = 255 * alpha;
        }
      }
    }
    const dot = (x, y, [r, g, b]) => pixels.set([r, g, b, 255], 4 * (y * width + x));
    for (const { bitmap, color } of ordered) {
      const value = rgb(color);
      outline(bitmap, width, height, 2, (x, y) => dot(x, y, value));
    }
    for (const bitmap of objects) {
      const thick = area(bitmap) < THIN ? 1 : 2;
      outline(bitmap, width, height, thick, (x, y) => dot(x, y, ((x + y) >> 2) & 1 ? [255, 255, 255] : [0, 0, 0]));
    }
    context.putImageData(image, 0, 0);
    if (!labelled) return;
    context.font = "bold 11px sans-serif";
    context.textAlign = "center";
    context.textBaseline = "middle";
    for (const mask of ordered) {
      const [x, y] = middle(mask.bitmap, width, height);
      const half = context.measureText(mask.label).width / 2 + 2;
      context.fillStyle = "#000000c0";
      context.fillRect(x - half, y - 7, 2 * half, 14);
      context.fillStyle = "#ffffff";
      context.fillText(mask.label, x, y + 1);
    }
  }

  /** The middle of the longest run of a mask, which lies inside the mask. */
  function middle(bitmap, width, height) {
    let best = 0;
    let place = [0, 0];
    for (let x = 0; x < width; x++) {
      for (let y = 0, length = 0; y < height; y++) {
        length = bitmap[x * height + y] ? length + 1 : 0;
        if (length > best) {
          best = length;
          place = [x, y - (length >> 1)];
        }
      }
    }
    return place.map((v, i) => Math.min(Math.max(v, 8), (i ? height : width) - 8));
  }

  function seriesColor(file) {
    const colors = ["#56b4e9", "#d55e00", "#009e73", "#cc79a7", "#0072b2", "#e69f00"];
    return colors[file % colors.length];
  }

  // Kinds of grids: what a card says, and which masks it draws -----------------------------------------------------------------------------

  const score = (value) => (value === null ? "–" : value.toFixed(2));

  /** One layer per picture of the viewer: {title, masks: [[counts, color, label, facts]], objects: [counts]}. */
  const kinds = {
    gallery: {
      count: report.gallery.names.length,
      name: (i) => report.gallery.names[i],
      facts(i) {
        const g = report.gallery;
        return names.map((name, f) => {
          const parts = [`${g.counts[f][i]} proposals`];
          if (g.best[f][i] !== null) parts.push(`best score ${score(g.best[f][i])}`);
          if (g.overlaps && g.overlaps[f][i] !== null) parts.push(`overlap ${score(g.overlaps[f][i])}`);
          return (several ? `${name}: ` : "") + parts.join(", ");
        });
      },
      layers(i, data, state) {
        return names.map((title, f) => ({
          title,
          masks: data.sets[f]
            .slice(0, state.masks)
            .map(([value, counts], k) => [counts, COLORS[k % COLORS.length], `${k + 1}`, `score ${score(value)}`, value])
            .filter(([counts, , , , value]) => counts !== null && value >= state.lowest),
          objects: state.objects ? data.objects : [],
        }));
      },
    },
    worst: {
      count: report.worst.length,
      name: (i) => report.worst[i].name,
      facts(i) {
        const item = report.worst[i];
        const objects = `${item.objects} annotated object${item.objects === 1 ? "" : "s"}`;
        return [objects, ...names.map((name, f) => `${several ? `${name}: ` : ""}overlap ${score(item.overlaps[f])}`)];
      },
      layers: (i, data) =>
        names.map((title, f) => ({
          title,
          masks: data.sets[f]
            .map(([iou, counts], k) => [counts, COLORS[k % COLORS.length], `${k + 1}`, `object ${k + 1}: best IoU ${score(iou)}`])
            .filter(([counts]) => counts !== null),
          objects: data.objects,
        })),
    },
    misses: {
      count: report.misses.length,
      small: true,
      name: (i) => report.misses[i].category,
      facts(i, state) {
        const item = report.misses[i];
        const lines = names.map((name, f) => {
          const iou = item.ious[state.count][f];
          const found = iou ? `best IoU ${score(iou)}, rank ${item.ranks[state.count][f] + 1}` : "no mask overlaps it";
          return (several ? `${name}: ` : "") + found;
        });
        return [`${item.size}, ${item.image}`, ...lines];
      },
      layers(i, data, state) {
        const item = report.misses[i];
        const masks = data.sets[state.count]
          .map((counts, f) => [counts, seriesColor(f), several ? names[f] : "best", `${names[f]}: IoU ${score(item.ious[state.count][f])}`])
          .filter(([counts]) => counts !== null);
        return [{ title: "", masks, objects: data.objects }];
      },
    },
  };

  // Controls ------------------------------------------------------------------------------------------------------------------------------

  function select(label, options, change) {
    const box = make("select", {}, ...options.map(([value, text]) => make("option", { value }, text)));
    box.addEventListener("change", () => change(box.value));
    return [make("label", {}, label, box), box];
  }

  function slider(label, { min, max, step, value }, show, change) {
    const text = make("span", {}, `${label}: ${show(value)}`);
    const box = make("input", { type: "range", min, max, step, value });
    box.setAttribute("aria-label", label);
    box.value = value;
    box.addEventListener("input", () => {
      text.textContent = `${label}: ${show(Number(box.value))}`;
      change(Number(box.value));
    });
    return make("label", {}, text, box);
  }

  function checkbox(label, checked, change) {
    const box = make("input", { type: "checkbox", checked });
    box.addEventListener("change", () => change(box.checked));
    return make("label", { className: "check" }, box, label);
  }

  function makeControls(grid) {
    const { state, kind } = grid;
    const found = [];
    const set = (key, convert = (value) => value) => (value) => {
      state[key] = convert(value);
      grid.refresh();
    };
    const redraw = (key, convert = (value) => value) => (value) => {
      state[key] = convert(value);
      grid.redraw();
    };
    if (kind === "gallery") {
      const search = make("input", { type: "search", autocomplete: "off", spellcheck: false });
      search.addEventListener("input", () => set("text")(search.value));
      found.push(make("label", {}, "File name contains", search));
      const [low, high] = report.gallery.range;
      if (high > low) {
        const step = (high - low) / 100;
        found.push(slider("Lowest score", { min: low, max: high, step, value: low }, (v) => v.toFixed(2), set("lowest")));
      }
      if (report.gallery.masks > 1) {
        const masks = { min: 1, max: report.gallery.masks, step: 1, value: state.masks };
        found.push(slider("Maximum number of masks", masks, (v) => `${v}`, redraw("masks")));
      }
      const orders = [["", "as in the file"], ["name", "file name"], ["score", "highest score first"], ["count", "most proposals first"]];
      if (report.gallery.overlaps) {
        orders.push(["overlap", "lowest overlap first"]);
        if (several) {
          const last = names[names.length - 1];
          orders.push(["loss", `${last} worse than ${names[0]} first`], ["gain", `${last} better than ${names[0]} first`]);
        }
      }
      found.push(select("Order", orders, set("order"))[0]);
    }
    if (kind === "misses") {
      const counts = report.missCounts.map((count, i) => [i, `first ${count} proposals`]);
      found.push(select("Missed among the", counts, set("count", Number))[0]);
      if (several) {
        const by = [["any", "any file"], ["all", "all files"], ...names.map((name, f) => [f, name]), ...names.map((name, f) => [`only ${f}`, `only ${name}`])];
        found.push(select("Missed by", by, set("by"))[0]);
      }
      const sizes = [["", "all sizes"], ...["small", "medium", "large"].map((size) => [size, size])];
      found.push(select("Objects", sizes, set("size"))[0]);
    }
    if (several && kind !== "misses") {
      found.push(select("Masks on the cards", names.map((name, f) => [f, name]), set("file", Number))[0]);
    }
    if (kind === "gallery" && report.gallery.overlaps) {
      found.push(checkbox("Annotated objects", state.objects, redraw("objects")));
    }
    const [label, box] = select("Draw masks", [["hover", "when a card is pointed at"], ["always", "always"]], redraw("draw"));
    box.value = state.draw;
    found.push(label);
    const controls = make("div", { className: "controls", role: "group", "aria-label": "Selection" }, ...found);
    const narrow = window.matchMedia("(max-width: 45rem)").matches;
    return make("details", { className: "selection", open: !narrow }, make("summary", {}, "Selection and order"), controls);
  }

  function makeLegend(kind) {
    const entries = [];
    const color = (value) => make("span", { className: "color", style: `background: ${value}` });
    if (kind === "misses") {
      names.forEach((name, f) => entries.push(make("li", {}, color(seriesColor(f)), several ? `best mask of ${name}` : "best mask")));
    } else {
      const of = kind === "gallery" ? "by rank of the score" : "one per object";
      entries.push(make("li", {}, `Colours of masks, ${of}:`));
      COLORS.forEach((value, i) => entries.push(make("li", {}, color(value), `${i + 1}`)));
      entries.push(make("li", {}, "then again from 1"));
    }
    if (kind !== "gallery" || report.gallery.overlaps) {
      const text = kind === "misses" ? "missed object" : "annotated object";
      entries.push(make("li", {}, make("span", { className: "color object" }), text));
    }
    return make("ul", { className: "mask-legend" }, ...entries);
  }

  // Grids ---------------------------------------------------------------------------------------------------------------------------------

  /** Indices of the items that the controls select, in their order. */
  function selected(kind, state) {
    const all = Array.from({ length: kinds[kind].count }, (_, i) => i);
    if (kind === "misses") {
      return all.filter((i) => {
        const item = report.misses[i];
        const by = item.missedBy[state.count];
        if (!by.length || (state.size && !item.sizes.includes(state.size))) return false;
        if (state.by === "any") return true;
        if (state.by === "all") return by.length === names.length;
        if (state.by.startsWith("only")) return by.length === 1 && by[0] === Number(state.by.slice(5));
        return by.includes(Number(state.by));
      });
    }
    if (kind === "worst") return all;
    const g = report.gallery;
    const text = state.text.toLowerCase();
    const chosen = all.filter((i) => {
      if (!g.names[i].toLowerCase().includes(text)) return false;
      return state.lowest <= g.range[0] || g.best.some((best) => best[i] !== null && best[i] >= state.lowest);
    });
    const f = state.file;
    const last = names.length - 1;
    const keys = {
      score: (i) => (g.best[f][i] === null ? Infinity : -g.best[f][i]),
      count: (i) => -g.counts[f][i],
      overlap: (i) => g.overlaps[f][i] ?? Infinity,
      loss: (i) => (g.overlaps[last][i] === null ? Infinity : g.overlaps[last][i] - g.overlaps[0][i]),
      gain: (i) => (g.overlaps[last][i] === null ? Infinity : g.overlaps[0][i] - g.overlaps[last][i]),
    };
    if (state.order === "name") return chosen.sort((a, b) => g.names[a].localeCompare(g.names[b]));
    const key = keys[state.order];
    return key ? chosen.sort((a, b) => (key(a) === key(b) ? a - b : key(a) < key(b) ? -1 : 1)) : chosen;
  }

  function bitmaps(layer, data) {
    return {
      masks: layer.masks.map(([counts, color, label, facts]) => {
        const bitmap = decode(counts, data.w, data.h);
        return { bitmap, color, label, facts, area: area(bitmap) };
      }),
      objects: layer.objects.map((counts) => decode(counts, data.w, data.h)),
    };
  }

  function makeGrid(root) {
    const kind = root.dataset.grid;
    const touch = window.matchMedia("(hover: none)").matches;
    const state = {
      page: 0, text: "", lowest: -Infinity, masks: Math.min(10, report.gallery.masks), order: "", file: 0,
      objects: false, draw: touch || kind === "misses" ? "always" : "hover", count: 0, by: "any", size: "",
    };
    const status = make("p", { className: "status", role: "status" });
    const cards = make("ul", { className: kinds[kind].small ? "cards small" : "cards" });
    const back = make("button", { type: "button" }, "Previous page");
    const next = make("button", { type: "button" }, "Next page");
    const place = make("span");
    const pager = make("div", { className: "pager" }, back, place, next);
    let list = [];
    let shown = [];

    const observer = new IntersectionObserver(
      (entries) => entries.forEach((entry) => {
        const card = shown.find((one) => one.element === entry.target);
        if (entry.isIntersecting && card) card.load();
      }),
      { rootMargin: "300px" },
    );

    function makeCard(index, position) {
      const frame = make("span", { className: "frame" });
      const facts = make("span", { className: "facts" }, ...kinds[kind].facts(index, state).map((line) => make("span", {}, line)));
      const button = make("button", { type: "button", className: "card" }, frame, make("span", { className: "name" }, kinds[kind].name(index)), facts);
      button.title = kinds[kind].name(index);
      const element = make("li", {}, button);
      let data = null;
      let canvas = null;
      let active = false;
      const card = {
        element,
        load() {
          if (data) return;
          data = read(`${kind}-${index}`);
          frame.append(...picture(data));
          canvas = make("canvas", { width: 1, height: 1 });
          frame.append(canvas);
          card.draw();
        },
        draw() {
          if (!data) return;
          const layers = kinds[kind].layers(index, data, state);
          const layer = layers[Math.min(state.file, layers.length - 1)];
          const { masks, objects } = bitmaps(layer, data);
          paint(canvas, data.w, data.h, active || state.draw === "always" ? masks : [], objects, false);
        },
      };
      const activate = (value) => () => {
        active = value;
        if (value) card.load();
        if (state.draw === "hover") card.draw();
      };
      button.addEventListener("pointerenter", activate(true));
      button.addEventListener("pointerleave", activate(false));
      button.addEventListener("focus", activate(true));
      button.addEventListener("blur", activate(false));
      button.addEventListener("click", () => viewer.open(kind, list, position, state, button));
      return card;
    }

    const grid = {
      kind,
      state,
      refresh() {
        state.page = 0;
        list = selected(kind, state);
        grid.show();
      },
      redraw: () => shown.forEach((card) => card.draw()),
      show() {
        observer.disconnect();
        const pages = Math.max(Math.ceil(list.length / PAGE), 1);
        const first = state.page * PAGE;
        shown = list.slice(first, first + PAGE).map((index, i) => makeCard(index, first + i));
        cards.replaceChildren(...shown.map((card) => card.element));
        shown.forEach((card) => observer.observe(card.element));
        const what = kind === "misses" ? "missed objects" : "images";
        const total = kinds[kind].count;
        status.textContent = list.length
          ? `${list.length} of ${total} ${what}; ${first + 1} to ${Math.min(first + PAGE, list.length)} are shown`
          : total ? `None of the ${total} ${what} fits the selection` : `There are no ${what} to show`;
        place.textContent = `Page ${state.page + 1} of ${pages}`;
        back.disabled = state.page === 0;
        next.disabled = state.page >= pages - 1;
        pager.hidden = pages === 1;
        pager.style.display = pages === 1 ? "none" : "";
      },
    };
    const turn = (step) => () => {
      state.page += step;
      grid.show();
      root.scrollIntoView({ block: "start" });
    };
    back.addEventListener("click", turn(-1));
    next.addEventListener("click", turn(1));
    root.replaceChildren(makeControls(grid), makeLegend(kind), status, cards, pager);
    grid.refresh();
  }

  function picture(data) {
    return data.p ? [make("img", { src: data.p, alt: "", decoding: "async" })] : [make("span", { className: "absent" }, "no picture")];
  }

  // Viewer --------------------------------------------------------------------------------------------------------------------------------

  const viewer = (() => {
    const part = (name) => document.getElementById(`viewer-${name}`);
    const dialog = document.getElementById("viewer");
    const pictures = dialog.querySelector(".viewer-pictures");
    let kind, list, position, state, opener;

    function show() {
      const index = list[position];
      const data = read(`${kind}-${index}`);
      part("title").textContent = kinds[kind].name(index);
      part("facts").replaceChildren(...kinds[kind].facts(index, state).map((line) => make("span", { style: "display: block" }, line)));
      part("place").textContent = `${position + 1} of ${list.length}`;
      part("previous").disabled = position === 0;
      part("next").disabled = position >= list.length - 1;
      const entries = [];
      const figures = kinds[kind].layers(index, data, state).map((layer) => {
        const { masks, objects } = bitmaps(layer, data);
        const canvas = make("canvas");
        let pinned = null;
        const buttons = masks.map((mask, k) => {
          const button = make("button", { type: "button", "aria-pressed": "false" },
            make("span", { className: "color", style: `background: ${mask.color}` }), kind === "gallery" ? `${mask.label}. ${mask.facts}` : mask.facts);
          button.addEventListener("pointerenter", () => draw(k));
          button.addEventListener("pointerleave", () => draw(pinned));
          button.addEventListener("focus", () => draw(k));
          button.addEventListener("blur", () => draw(pinned));
          button.addEventListener("click", () => {
            pinned = pinned === k ? null : k;
            draw(pinned);
          });
          return button;
        });
        function draw(only) {
          paint(canvas, data.w, data.h, only === null ? masks : [masks[only]], objects, only === null && kind !== "misses");
          buttons.forEach((button, k) => button.setAttribute("aria-pressed", String(k === only)));
        }
        canvas.addEventListener("pointermove", (event) => {
          const box = canvas.getBoundingClientRect();
          const scale = Math.min(box.width / data.w, box.height / data.h);
          const x = Math.floor((event.clientX - box.left - (box.width - scale * data.w) / 2) / scale);
          const y = Math.floor((event.clientY - box.top - (box.height - scale * data.h) / 2) / scale);
          let hit = null;
          if (x >= 0 && y >= 0 && x < data.w && y < data.h) {
            masks.forEach((mask, k) => {
              if (mask.bitmap[x * data.h + y] && (hit === null || mask.area < masks[hit].area)) hit = k;
            });
          }
          draw(hit ?? pinned);
        });
        canvas.addEventListener("pointerleave", () => draw(pinned));
        draw(null);
        if (several && kind !== "misses") entries.push(make("li", {}, make("b", {}, layer.title)));
        if (!masks.length) entries.push(make("li", {}, kind === "gallery" ? "no masks" : "no mask overlaps an object"));
        entries.push(...buttons.map((button) => make("li", {}, button)));
        const caption = several && layer.title ? [make("figcaption", {}, layer.title)] : [];
        return make("figure", {}, ...caption, make("div", { className: "frame" }, ...picture(data), canvas));
      });
      pictures.replaceChildren(...figures);
      part("masks").replaceChildren(...entries);
    }

    function move(step) {
      if (position + step < 0 || position + step >= list.length) return;
      position += step;
      show();
    }
    part("previous").addEventListener("click", () => move(-1));
    part("next").addEventListener("click", () => move(1));
    part("close").addEventListener("click", () => dialog.close());
    dialog.addEventListener("keydown", (event) => {
      if (event.key === "ArrowLeft") move(-1);
      else if (event.key === "ArrowRight") move(1);
    });
    dialog.addEventListener("click", (event) => {
      if (event.target === dialog) dialog.close();
    });
    dialog.addEventListener("close", () => {
      pictures.replaceChildren();
      part("masks").replaceChildren();
      if (opener.isConnected) opener.focus();
    });
    return {
      open(...values) {
        [kind, list, position, state, opener] = values;
        show();
        dialog.showModal();
      },
    };
  })();

  const failed = read("failed");
  if (failed) {
    const text = `${failed} image${failed === 1 ? "" : "s"} could not be read and ${failed === 1 ? "is" : "are"} shown without a picture.`;
    document.querySelector("header").append(make("p", { className: "note" }, text));
  }
  document.querySelectorAll("[data-grid]").forEach(makeGrid);
})();
