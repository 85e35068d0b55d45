"use strict";

const main = document.querySelector("main");
const { kind, rater, item } = main.dataset;
const problem = document.getElementById("problem");
const zoom = document.getElementById("zoom");

// seconds for which the page was in sight
let shownSince = document.hidden ? null : performance.now();
let seen = 0;
document.addEventListener("visibilitychange", () => {
  if (document.hidden && shownSince !== null) seen += performance.now() - shownSince;
  shownSince = document.hidden ? null : performance.now();
});
const seconds = () => (seen + (shownSince === null ? 0 : performance.now() - shownSince)) / 1000;

// one id for one decision: the same request sent twice counts once
let identity = null;
let busy = false;

async function send(address, decision) {
  if (busy) return;
  busy = true;
  identity ??= crypto.randomUUID();
  try {
    const answer = await fetch(address, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ id: identity, rater, ...decision }),
    });
    if (!answer.ok) throw new Error(await answer.text());
    const { next } = await answer.json();
    if (next) return location.replace(next); // stays busy until the next page is here
    problem.textContent = "There is nothing to undo.";
    identity = null;
  } catch (error) {
    problem.textContent = `Not saved: ${error.message}. Is the server running? The same key tries again.`;
  }
  busy = false;
}

function decide(choice) {
  const own = kind === "picks" ? { picked: choice || null, scores_shown: main.dataset.scores === "1" } : { choice };
  send(`/decide/${kind}`, { item, seconds: seconds(), ...own });
}

const undo = () => send(`/undo/${kind}`, {});

function enlarge(address) {
  const image = zoom.querySelector("img");
  image.src = address;
  zoom.showModal();
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (event.target.closest("#zoom")) zoom.close();
  else if (!button) return;
  else if ("zoom" in button.dataset) enlarge(button.dataset.zoom);
  else if ("choice" in button.dataset) decide(button.dataset.choice);
  else if (button.id === "undo") undo();
});

document.addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey || zoom?.open) return;
  if (event.target.matches("input, select, textarea")) return;
  const choices = [...document.querySelectorAll("button.image[data-choice]")];
  const follow = { ArrowLeft: "previous", ArrowRight: "next", s: "scores" }[event.key];
  if (follow) document.querySelector(`a#${follow}`)?.click();
  else if (event.key === "z") document.body.classList.toggle("large");
  else if (!kind) return;
  else if (event.key === "u") undo();
  else if (!item) return;
  else if (event.key === "0") document.querySelector(".controls button[data-choice]").click();
  else if (/^[1-9]$/.test(event.key)) choices[event.key - 1]?.click();
  else return;
  event.preventDefault();
});

// a page that the browser kept alive shows an old state
window.addEventListener("pageshow", (event) => event.persisted && location.reload());

for (const image of document.images) {
  const small = () => image.naturalWidth && image.naturalWidth <= 128 && image.classList.add("tiny");
  image.addEventListener("load", small);
  small();
}
for (const address of (main.dataset.preload ?? "").split(" ").filter(Boolean)) new Image().src = address;
