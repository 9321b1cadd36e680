// What a reader would complain of on the page that is open. `lay_out()` finds what is in the wrong place and lists the
// texts; `look(texts, picture)` judges them and the pictures by the pixels of the page without its texts.

/** Returns the part of a rectangle in an element that is to be seen; `cut` where what does not scroll hides the rest. */
function visible({left, right, top, bottom}, element) {
  let cut = false;
  for (let above = element; above && above !== document.documentElement; above = above.parentElement) {
    const style = getComputedStyle(above), box = above.getBoundingClientRect();
    if (style.overflowX === "visible" && style.overflowY === "visible") continue;
    const scrolls = ["auto", "scroll"].includes(style.overflowX) || ["auto", "scroll"].includes(style.overflowY);
    if (!scrolls) cut ||= left < box.left - 1 || right > box.right + 1 || top < box.top - 2 || bottom > box.bottom + 2;
    left = Math.max(left, box.left), right = Math.min(right, box.right);
    top = Math.max(top, box.top), bottom = Math.min(bottom, box.bottom);
  }
  return {left, right, top, bottom, cut};
}

/** Returns each line of each text: where it is seen, its colour, the size of its letters in pixels. */
function lines() {
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
  for (let node; (node = walker.nextNode());) {
    const element = node.parentElement, style = getComputedStyle(element), drawn = element instanceof SVGElement;
    if (!node.data.trim() || element.closest("title, style, script") || style.visibility !== "visible") continue;
    const text = node.data.trim().slice(0, 60), color = drawn ? style.fill : style.color;
    const size = parseFloat(style.fontSize) * (drawn ? element.getScreenCTM().a : 1);
    const range = document.createRange();
    range.selectNodeContents(node);
    for (const box of range.getClientRects())
      if (box.width >= 1) found.push({node, text, color, size, height: box.height, ...visible(box, element)});
  }
  return found;
}

/** Whether two lines stand on each other. A line's box holds room above and below its letters, which others may use. */
function covers(a, b) {
  const deep = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
  return Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 && deep > 0.2 * (a.height + b.height) + 2;
}

function lay_out() {
  const faults = [], width = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth > width) {
    const wide = [...document.body.querySelectorAll("*")].filter(
      e => visible(e.getBoundingClientRect(), e.parentElement).right > width + 1);
    const names = wide.map(e => [e.localName, ...e.classList].join("."));
    faults.push(`the page is ${document.documentElement.scrollWidth} px wide and ${width} fit: ${names.slice(0, 5)}`);
  }
  if (width > 1000) for (const box of document.querySelectorAll(".scroll, figure, pre")) {
    const text = box.textContent.trim().slice(0, 40);
    if (box.scrollWidth > box.clientWidth) faults.push(`scrolls, where there is room: ${text}`);
  }
  const written = lines();
  for (const line of written) {
    if (line.cut) faults.push(`cut off: ${line.text}`);
    if (line.size < 9) faults.push(`too small to read, ${line.size.toFixed(1)} px: ${line.text}`);
  }
  const seen = written.filter(line => line.right - line.left > 1 && line.bottom - line.top > 1);
  seen.forEach((a, i) => seen.slice(i + 1).forEach(b => {
    if (a.node !== b.node && covers(a, b)) faults.push(`one covers the other: ${a.text} | ${b.text}`);
  }));
  for (const link of document.querySelectorAll('a[href^="#"]')) {
    const to = decodeURIComponent(link.hash.slice(1));
    if (to && !document.getElementById(to)) faults.push(`leads nowhere: ${link.hash}`);
  }
  for (const image of document.images) if (!image.naturalWidth) faults.push(`does not load: ${image.src.slice(0, 60)}`);
  const texts = seen.map(line => ({text: line.text, color: line.color, ...on_page(line)}));
  return {faults, texts};
}

/** Returns a rectangle of the window as one of the page. */
function on_page({left, right, top, bottom}) {
  return {left: left + scrollX, right: right + scrollX, top: top + scrollY, bottom: bottom + scrollY};
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

/** Returns what is wrong with texts and pictures, given the page without texts as PNG, base64. */
async function look(texts, png) {
  const image = new Image();
  image.src = "data:image/png;base64," + png;
  await image.decode();
  const brush = new OffscreenCanvas(image.width, image.height).getContext("2d", {willReadFrequently: true});
  brush.drawImage(image, 0, 0);

  /** Returns the colours of a rectangle, the most frequent first. */
  function colors({left, right, top, bottom}) {
    const [x, y] = [Math.floor(left), Math.floor(top)], counts = new Map();
    const pixels = brush.getImageData(x, y, Math.ceil(right - x), Math.ceil(bottom - y)).data;
    for (const pixel of new Uint32Array(pixels.buffer)) counts.set(pixel, (counts.get(pixel) ?? 0) + 1);
    const sorted = [...counts].sort((a, b) => b[1] - a[1]);
    return sorted.map(([pixel]) => [pixel & 255, (pixel >> 8) & 255, (pixel >> 16) & 255]);
  }

  const faults = [];
  for (const text of texts) {
    const [behind] = colors(text), [r, g, b, opacity = 1] = text.color.match(/[\d.]+/g).map(Number);
    const ink = [r, g, b].map((c, i) => opacity * c + (1 - opacity) * behind[i]), found = contrast(ink, behind);
    if (found < 4.5) faults.push(`contrast ${found.toFixed(2)} of ${text.color} on rgb(${behind}): ${text.text}`);
  }
  for (const drawing of document.querySelectorAll("svg, img, canvas")) {
    const box = drawing.getBoundingClientRect(), part = visible(box, drawing.parentElement);
    const name = drawing.outerHTML.slice(0, 60);
    if (box.width < 1 || box.height < 1) faults.push(`a picture without size: ${name}`);
    else if (part.right - part.left > 1 && colors(on_page(part)).length < 2) faults.push(`a blank picture: ${name}`);
  }
  return faults;
}
