// Dark or light: what was chosen here, else what the system says. Loaded before anything is drawn.
// Fires "theme" on the document when it changes.

(() => {
  const root = document.documentElement, system = matchMedia("(prefers-color-scheme: dark)");
  const told = () => document.dispatchEvent(new Event("theme"));
  const chosen = localStorage.getItem("theme");
  if (chosen) root.dataset.theme = chosen;
  system.addEventListener("change", told);
  document.addEventListener("DOMContentLoaded", () => {
    document.getElementById("theme").addEventListener("click", () => {
      const dark = (root.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";
      root.dataset.theme = dark ? "light" : "dark";
      localStorage.setItem("theme", root.dataset.theme);
      told();
    });
  });
})();
