// Waits until the page has drawn its first view, and returns when that was and how large the page is.
new Promise((resolve) => {
  // Longest wait in milliseconds.
  const LIMIT = 20000;
  const look = () => {
    const live = document.getElementById("live");
    const [mark] = performance.getEntriesByName("drawn");
    if (!mark && performance.now() < LIMIT) {
      requestAnimationFrame(look);
      return;
    }
    // The next frame shows what was drawn, and the timer runs after it.
    requestAnimationFrame(() => setTimeout(() => resolve({
      drawn_ms: mark ? mark.startTime : null,
      painted_ms: performance.now(),
      elements: document.querySelectorAll("*").length,
      status: live ? live.textContent : "the page has no status",
    })));
  };
  look();
})
