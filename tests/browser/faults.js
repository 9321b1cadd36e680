// What a reader would complain of on the page that is open. `lay_out()` finds what is in the wrong place and lists the
// texts; `look(texts, picture)` judges them and the pictures by the pixels of the page without its texts.

const text_faults = {
  /** Returns the part of a rectangle that is to be seen, and whether something that does not scroll cuts it off. */
  visible(rectangle, element) {
    let {left, right, top, bottom} = rectangle, cut = false;
    for (let above = element; above && above !== document.documentElement; above = above.parentElement) {
      const style = getComputedStyle(above), drawing = above instanceof SVGSVGElement;
      if (style.overflowX === "visible" && style.overflowY === "visible") continue;
      const box = above.getBoundingClientRect();
      const scrolls = !drawing && [style.overflowX, style.overflowY].some(o => o === "auto" || o === "scroll");
      if (!scrolls) cut ||= left < box.left - 1 || right > box.right + 1 || top < box.top - 2 || bottom > box.bottom + 2;
      left = Math.max(left, box.left), right = Math.min(right, box.right);
      top = Math.max(top, box.top), bottom = Math.min(bottom, box.bottom);
    }
    return {left, right, top, bottom, cut};
  },

  /** Returns each line of each text: where it is seen, its colour, its size in pixels. */
  lines() {
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
    for (let node; (node = walker.nextNode());) {
      const element = node.parentElement, style = getComputedStyle(element);
      if (!node.data.trim() || element.closest("title, style, script") || style.visibility !== "visible") continue;
      const range = document.createRange();
      range.selectNodeContents(node);
      const drawn = element instanceof SVGElement;
      const scale = drawn ? element.getScreenCTM().a : 1;
      for (const rectangle of range.getClientRects()) {
        if (rectangle.width < 1) continue;
        found.push({
          node, text: node.data.trim().slice(0, 60), color: drawn ? style.fill : style.color,
          size: parseFloat(style.fontSize) * scale, whole: rectangle, ...this.visible(rectangle, element),
        });
      }
    }
    return found;
  },

  overlap(a, b) {
    // A line's box holds room above and below its letters, which the next line may use.
    const deep = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    const room = 0.2 * (a.whole.height + b.whole.height) / 2 + 1;
    return Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 && deep > 2 * room;
  },
};

function lay_out() {
  const faults = [], width = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth > width) {
    const wide = [...document.body.querySelectorAll("*")].filter(
      e => text_faults.visible(e.getBoundingClientRect(), e.parentElement).right > width + 1);
    const names = wide.map(e => [e.localName, ...e.classList].join("."));
    faults.push(`the page is ${document.documentElement.scrollWidth} px wide and ${width} fit: ${names.slice(0, 5)}`);
  }
  if (width > 1000) for (const box of document.querySelectorAll(".scroll, figure, pre")) {
    if (box.scrollWidth > box.clientWidth) faults.push(`scrolls where there is room: ${box.textContent.trim().slice(0, 40)}`);
  }
  const lines = text_faults.lines();
  for (const line of lines) {
    if (line.cut) faults.push(`cut off: ${line.text}`);
    if (line.size < 9) faults.push(`too small to read, ${line.size.toFixed(1)} px: ${line.text}`);
  }
  const seen = lines.filter(line => line.right - line.left > 1 && line.bottom - line.top > 1);
  seen.forEach((a, i) => seen.slice(i + 1).forEach(b => {
    if (a.node !== b.node && text_faults.overlap(a, b)) faults.push(`one covers the other: ${a.text} | ${b.text}`);
  }));
  for (const link of document.querySelectorAll('a[href^="#"]')) {
    const to = decodeURIComponent(link.hash.slice(1));
    if (to && !document.getElementById(to)) faults.push(`leads nowhere: ${link.hash}`);
  }
  for (const image of document.images) if (!image.naturalWidth) faults.push(`does not load: ${image.src.slice(0, 60)}`);
  const texts = seen.map(({text, color, left, right, top, bottom}) =>
    ({text, color, left: left + scrollX, right: right + scrollX, top: top + scrollY, bottom: bottom + scrollY}));
  return {faults, texts};
}

/** Shows the page without its texts; what stands behind them stays, such as the outline of a label. */
function hide_texts() {
  const style = document.createElement("style");
  style.textContent = "* { color: transparent !important } svg text { fill: transparent !important }";
  document.head.append(style);
}

/** WCAG 2.2: the relative luminance of a colour, and the contrast of two. */
function luminance(color) {
  const [r, g, b] = color.map(c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

function contrast(a, b) {
  const [dark, light] = [luminance(a), luminance(b)].sort((x, y) => x - y);
  return (light + 0.05) / (dark + 0.05);
}

async function look(texts, picture) {
  const image = new Image();
  image.src = "data:image/png;base64," + picture;
  await image.decode();
  const canvas = new OffscreenCanvas(image.width, image.height), brush = canvas.getContext("2d", {willReadFrequently: true});
  brush.drawImage(image, 0, 0);
  const scale = devicePixelRatio;

  /** Returns the colours of a rectangle in CSS pixels, the most frequent first. */
  function colors({left, right, top, bottom}) {
    const [x, y] = [Math.floor(left * scale), Math.floor(top * scale)];
    const [w, h] = [Math.ceil((right - left) * scale), Math.ceil((bottom - top) * scale)];
    const pixels = new Uint32Array(brush.getImageData(x, y, Math.max(1, w), Math.max(1, h)).data.buffer), counts = new Map();
    for (const pixel of pixels) counts.set(pixel, (counts.get(pixel) ?? 0) + 1);
    const sorted = [...counts].sort((a, b) => b[1] - a[1]);
    return sorted.map(([p]) => [p & 255, (p >> 8) & 255, (p >> 16) & 255]);
  }

  const faults = [];
  for (const text of texts) {
    const [behind] = colors(text);
    const [r, g, b, a = 1] = text.color.match(/[\d.]+/g).map(Number);
    const ink = [r, g, b].map((c, i) => a * c + (1 - a) * behind[i]), found = contrast(ink, behind);
    if (found < 4.5) faults.push(`contrast ${found.toFixed(2)} of ${text.color} on rgb(${behind}): ${text.text}`);
  }
  for (const drawing of document.querySelectorAll("svg, img, canvas")) {
    const box = drawing.getBoundingClientRect();
    const seen = text_faults.visible(box, drawing.parentElement);
    if (box.width < 2 || box.height < 2) faults.push(`a picture without size: ${drawing.outerHTML.slice(0, 80)}`);
    else if (seen.right - seen.left < 2) continue; // scrolled out of sight
    else if (colors({...seen, left: seen.left + scrollX, right: seen.right + scrollX, top: seen.top + scrollY,
                     bottom: seen.bottom + scrollY}).length < 2) faults.push(`a blank picture: ${drawing.outerHTML.slice(0, 80)}`);
  }
  return faults;
}
