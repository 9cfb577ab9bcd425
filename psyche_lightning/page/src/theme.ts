/** Light or dark: as the system has it, or as chosen here. */

export type Theme = "auto" | "light" | "dark";

const KEY = "psyche-theme";
const watching = new Set<() => void>();
const tones = new Map<string, string>();

export function chosen(): Theme {
  try {
    const kept = localStorage.getItem(KEY);
    return kept === "light" || kept === "dark" ? kept : "auto";
  } catch {
    return "auto";
  }
}

export function choose(theme: Theme): void {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  try {
    if (theme === "auto") localStorage.removeItem(KEY);
    else localStorage.setItem(KEY, theme);
  } catch {
    // A browser that keeps nothing forgets the choice.
  }
  changed();
}

/** Call `listener` when colours change, since a canvas does not follow them by itself. */
export function onTheme(listener: () => void): () => void {
  watching.add(listener);
  return () => watching.delete(listener);
}

/** The present value of one of the style's colours, for a canvas. */
export function tone(name: string): string {
  let value = tones.get(name);
  if (value === undefined) {
    const probe = document.body.appendChild(document.createElement("i"));
    probe.style.color = `var(--${name})`;
    value = getComputedStyle(probe).color;
    probe.remove();
    tones.set(name, value);
  }
  return value;
}

function changed(): void {
  tones.clear();
  for (const listener of watching) listener();
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", changed);
