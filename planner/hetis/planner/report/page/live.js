// The page looks at where it came from every two seconds and shows what changed, until the reader pauses it.
const PERIOD_MS = 2000;
const freshness = document.getElementById("freshness");
const pause = document.getElementById("pause");
let paused = false;
pause.hidden = false;
pause.addEventListener("click", () => {
  paused = !paused;
  pause.textContent = paused ? "Go on" : "Pause";
  pause.setAttribute("aria-label", paused ? "Go on with the updates of this page" : "Pause the updates of this page");
});
const said = (text) => { if (freshness.textContent !== text) { freshness.textContent = text; } };
const show = (text) => {
  const fresh = new DOMParser().parseFromString(text, "text/html").querySelector("main");
  const main = document.querySelector("main");
  if (!fresh || fresh.innerHTML === main.innerHTML) { return; }
  const within = (root) => [...root.querySelectorAll("summary, a, [tabindex]")];
  const focused = within(main).indexOf(document.activeElement);
  const open = [...main.querySelectorAll("details")].map((one) => one.open);
  const scrolled = [...main.querySelectorAll(".table")].map((one) => one.scrollLeft);
  main.replaceChildren(...fresh.childNodes);
  main.querySelectorAll("details").forEach((one, i) => { one.open = open[i] || one.open; });
  main.querySelectorAll(".table").forEach((one, i) => { one.scrollLeft = scrolled[i] || 0; });
  if (focused >= 0) { within(main)[focused]?.focus({ preventScroll: true }); }
};
const look = async () => {
  if (!paused && !document.hidden) {
    try {
      const answer = await fetch(location.href, { headers: { Accept: "text/html" }, cache: "no-store" });
      if (!answer.ok) { throw new Error(answer.status); }
      show(await answer.text());
      said("");
    } catch {
      said("The planner does not answer; this is what it said last.");
    }
  }
  setTimeout(look, PERIOD_MS);
};
setTimeout(look, PERIOD_MS);
