const dark = window.matchMedia("(prefers-color-scheme: dark)");
function draw(element) {
  const figure = figures[Number(element.dataset.figure)];
  Plotly.newPlot(element, figure.data, figure.layout, {responsive: true, displayModeBar: false});
  color(element);
}
function color(element) {
  Plotly.relayout(element, {"font.color": dark.matches ? "#c3c8d0" : "#3d424b"});
}
const seen = new IntersectionObserver(entries => entries.forEach(entry => {
  if (entry.isIntersecting) { seen.unobserve(entry.target); draw(entry.target); }
}), {rootMargin: "600px"});
document.querySelectorAll(".chart").forEach(element => {
  element.style.minHeight = figures[Number(element.dataset.figure)].layout.height + "px";
  seen.observe(element);
});
// A browser holds few 3D views at a time: only one list of them is open, and a closed one gives its views back.
document.querySelectorAll(".largest").forEach(list => list.addEventListener("toggle", () => {
  if (!list.open) list.querySelectorAll(".chart").forEach(element => { Plotly.purge(element); seen.observe(element); });
}));
dark.addEventListener("change", () => document.querySelectorAll(".js-plotly-plot").forEach(color));
window.addEventListener("beforeprint", () => document.querySelectorAll(".chart:not(.js-plotly-plot)").forEach(draw));
