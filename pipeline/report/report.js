// A reading at the pointer, or at the position that the arrow keys choose: the nearest point of every line, in words.
for (const chart of document.querySelectorAll("svg[data-lines]")) {
  const { x: xName, top, bottom, lines } = JSON.parse(chart.dataset.lines);
  const readout = chart.querySelector(".readout");
  const make = (name, attributes, text) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const show = (at) => {
    const nearest = lines.map((line) => ({
      ...line,
      point: line.points.reduce((a, b) => (Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a)),
    }));
    const x = nearest[0].point[0];
    const rows = nearest.filter(({ point }) => Math.abs(point[0] - x) < 12 && point[3]);
    if (!rows.length) return readout.replaceChildren();
    const width = 138, height = 22 + 17 * rows.length, whole = chart.viewBox.baseVal.width;
    const left = Math.max(0, x + 12 + width > whole - 8 ? Math.min(x - 12 - width, whole - width) : x + 12);
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
  };
  let position = lines[0].points.length - 1;
  chart.addEventListener("pointerleave", () => readout.replaceChildren());
  chart.addEventListener("blur", () => readout.replaceChildren());
  chart.addEventListener("pointermove", (event) => {
    show(new DOMPoint(event.clientX, event.clientY).matrixTransform(chart.getScreenCTM().inverse()).x);
  });
  chart.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by) return;
    event.preventDefault();
    const points = lines[0].points;
    position = Math.min(Math.max(position + by * Math.max(1, Math.round(points.length / 40)), 0), points.length - 1);
    show(points[position][0]);
  });
}

// Precision, recall and F1 of the class that is chosen, over the score threshold.
const curves = document.getElementById("class-curves");
if (curves) {
  const { scores, classes } = JSON.parse(curves.dataset.curves);
  const select = document.getElementById("class-choice");
  const draw = () => {
    const chosen = classes[select.value];
    const [left, right, top, bottom] = [34, 318, 10, 170];
    const path = (values) => {
      let command = "M", text = "";
      values.forEach((value, index) => {
        if (value === null) return (command = "M");
        const x = left + scores[index] * (right - left), y = bottom - value * (bottom - top);
        text += `${command}${x.toFixed(1)} ${y.toFixed(1)}`;
        command = "L";
      });
      return text;
    };
    ["precision", "recall", "f1"].forEach((name) => curves.querySelector(`.${name}`).setAttribute("d", path(chosen[name])));
    const best = chosen.best === null ? left : left + chosen.best * (right - left);
    curves.querySelector(".best").setAttribute("x1", best);
    curves.querySelector(".best").setAttribute("x2", best);
    document.getElementById("class-best").textContent = chosen.words;
  };
  select.addEventListener("change", draw);
  draw();
}
