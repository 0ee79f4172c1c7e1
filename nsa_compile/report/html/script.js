
"use strict";
// Without this script the page shows everything, and links in the picture lead to their layers.
const filter = document.getElementById("filter");

function show() {
  const wanted = filter.value;
  for (const layer of document.querySelectorAll("#layers > details")) {
    layer.hidden = wanted !== "" && layer.dataset.reason !== wanted;
  }
  for (const node of document.querySelectorAll(".node")) {
    node.classList.toggle("dim", wanted !== "" && node.dataset.reason !== wanted);
  }
}

function open() {
  const layer = /^#site-\d+$/.test(location.hash) && document.querySelector(location.hash);
  if (!layer) return;
  if (layer.hidden) {
    filter.value = "";
    show();
  }
  layer.open = true;
  layer.scrollIntoView();
}

if (filter) {
  filter.addEventListener("change", show);
  window.addEventListener("hashchange", open);
  for (const node of document.querySelectorAll(".node")) {
    // A second click on the same layer changes no hash.
    node.addEventListener("click", () => setTimeout(open));
  }
  show();
  open();
}
