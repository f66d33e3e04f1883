const thumbnails = JSON.parse(document.getElementById("thumbnails").textContent);
const FIRST = 60; // galaxies of a gallery before "Show all"

function make(tag, options, ...children) {
  const node = Object.assign(document.createElement(tag), options);
  node.append(...children);
  return node;
}
function tile([number, note]) {
  const {image, lines} = thumbnails[number], node = make("li", {className: "galaxy"});
  const size = {width: 104, height: 104};
  if (image) node.append(make("img", {src: image, alt: "Galaxy " + lines[0], loading: "lazy", ...size}));
  node.append(...lines.concat(note || []).map(line => make("div", {textContent: line})));
  return node;
}
function showGallery(target, title, galaxies) {
  const list = make("ul", {}, ...galaxies.slice(0, FIRST).map(tile));
  target.replaceChildren(make("h3", {textContent: title}), list);
  if (galaxies.length <= FIRST) return;
  const all = make("button", {className: "more", type: "button", textContent: `Show all ${galaxies.length}`});
  all.onclick = () => { list.append(...galaxies.slice(FIRST).map(tile)); all.remove(); };
  target.append(all);
}
function showSelection(numbers) {
  const target = document.getElementById("selected");
  if (numbers.length) showGallery(target, `${numbers.length} selected`, numbers.map(n => [n]));
  else target.replaceChildren();
}

for (const list of document.querySelectorAll("[data-tiles]")) list.append(...JSON.parse(list.dataset.tiles).map(tile));
for (const button of document.querySelectorAll("[data-cell]")) button.onclick = () => {
  const {title, cell} = button.dataset;
  showGallery(button.closest("details").querySelector(".galleries"), title, JSON.parse(cell));
};
const epoch = document.getElementById("epoch");
if (epoch) epoch.oninput = () => {
  const frames = [...document.querySelectorAll(".frame")], shown = frames[epoch.value].getAttribute("aria-label");
  frames.forEach((frame, i) => { frame.hidden = i !== Number(epoch.value); });
  document.querySelector("output").textContent = shown;
  epoch.setAttribute("aria-valuetext", shown);
};

function prepareMap() {
  const source = Bokeh.documents.map(doc => doc.get_model_by_name("map-data")).find(Boolean);
  if (!source) return;
  source.data.image = source.data.galaxy.map(number => thumbnails[number].image || "");
  const coloring = document.getElementById("coloring"), choose = document.getElementById("choose");
  coloring.onchange = () => {
    const {data} = source, name = coloring.value;
    [data.color, data.marker] = [data["color_" + name], data["marker_" + name]];
    source.change.emit();
    for (const legend of document.querySelectorAll(".legend")) legend.hidden = legend.dataset.coloring !== name;
  };
  choose.onchange = () => {
    const chosen = new Set(choose.value ? choose.value.split(" ").map(Number) : []);
    source.selected.indices = source.data.galaxy.flatMap((number, i) => chosen.has(number) ? [i] : []);
  };
  document.querySelector("#map figure").addEventListener("pointerdown", () => { choose.value = ""; });
}
addEventListener("load", () => {
  const wait = setInterval(() => {
    if (window.Bokeh && !Bokeh.documents.length) return;
    clearInterval(wait);
    if (window.Bokeh) prepareMap();
    document.body.dataset.ready = "yes";
  }, 50);
});
