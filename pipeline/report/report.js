// A reading at the pointer: the nearest point of every line, in words.
for (const chart of document.querySelectorAll("svg[data-lines]")) {
  const { x: xName, top, bottom, lines } = JSON.parse(chart.dataset.lines);
  const readout = chart.querySelector(".readout");
  const make = (name, attributes, text) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    return element;
  };
  chart.addEventListener("pointerleave", () => readout.replaceChildren());
  chart.addEventListener("pointermove", (event) => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(chart.getScreenCTM().inverse()).x;
    const nearest = lines.map((line) => ({
      ...line,
      point: line.points.reduce((a, b) => (Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a)),
    }));
    const x = nearest[0].point[0];
    const rows = nearest.filter(({ point }) => Math.abs(point[0] - x) < 12 && point[3]);
    if (!rows.length) return readout.replaceChildren();
    const width = 138, height = 22 + 17 * rows.length;
    const left = x + 12 + width > chart.viewBox.baseVal.width - 60 ? x - 12 - width : x + 12;
    const parts = [
      make("line", { x1: x, x2: x, y1: top, y2: bottom }),
      make("rect", { x: left, y: top, width, height, rx: 4 }),
      make("text", { x: left + 10, y: top + 16 }, `${xName} ${Number(nearest[0].point[2].toPrecision(3))}`),
    ];
    rows.forEach(({ name, colour, point }, index) => {
      const y = top + 33 + 17 * index;
      parts.push(make("circle", { cx: point[0], cy: point[1], r: 3.5, style: `fill:var(--series-${colour})` }));
      parts.push(make("text", { x: left + 10, y, style: `fill:var(--series-${colour})` }, name));
      parts.push(make("text", { x: left + width - 10, y, class: "end" }, point[3]));
    });
    readout.replaceChildren(...parts);
  });
}
