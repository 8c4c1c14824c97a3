// Runs before anything is shown: a theme that was chosen by hand is there from the first moment.
{
  let chosen = null
  try {
    chosen = localStorage.getItem("trigflow-theme")
  } catch {
    // no storage: the theme of the system
  }
  if (chosen === "dark" || chosen === "light") document.documentElement.dataset.theme = chosen
}
