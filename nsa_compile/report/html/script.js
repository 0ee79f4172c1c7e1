"use strict";
// Without this script the page shows everything, and links in the picture lead to their layers.
// A link to #reason=dropout opens the page with that filter, #site-3 with that layer.
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

function choose() {
  history.replaceState(null, "", filter.value ? `#reason=${filter.value}` : "#");
  show();
}

function open() {
  const reason = /^#reason=(\w+)$/.exec(location.hash);
  if (reason && [...filter.options].some((option) => option.value === reason[1])) {
    filter.value = reason[1];
    show();
  }
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
  filter.addEventListener("change", choose);
  window.addEventListener("hashchange", open);
  for (const node of document.querySelectorAll(".node")) {
    // A second click on the same layer changes no hash.
    node.addEventListener("click", () => setTimeout(open));
  }
  show();
  open();
}
