/** Where the page is: a path and options in the address's hash, so that whatever is shown has a link. */

export type Tab = "overview" | "nodes" | "events" | "about";

export interface Route {
  run: string | null;
  tab: Tab;
  node: string | null;
  options: URLSearchParams;
}

export function read(hash: string): Route {
  const [path = "", query = ""] = hash.replace(/^#\/?/, "").split("?", 2) as [string, string?];
  const [room, ...rest] = path.split("/");
  const [run, tab, node] = rest.map(decode);
  const options = new URLSearchParams(query);
  if (room !== "runs" || !run) return { run: null, tab: "overview", node: null, options };
  const known = tab === "nodes" || tab === "events" || tab === "about" ? tab : "overview";
  return { run, tab: known, node: (known === "nodes" && node) || null, options };
}

export function link(run: string | null, tab: Tab = "overview", node?: string | null, options?: Record<string, string>): string {
  const query = options && new URLSearchParams(options).toString();
  const parts = ["runs", ...(run === null ? [] : [run]), ...(tab === "overview" ? [] : [tab]), ...(node ? [node] : [])];
  return `#/${parts.map(encodeURIComponent).join("/")}${query ? `?${query}` : ""}`;
}

/** Change options of the address without a step in the browser's history; empty values are left out. */
export function setOptions(changes: Record<string, string | null>): void {
  const [path = "", query = ""] = location.hash.split("?", 2) as [string, string?];
  const options = new URLSearchParams(query);
  for (const [name, value] of Object.entries(changes)) {
    if (value === null || value === "") options.delete(name);
    else options.set(name, value);
  }
  const text = options.toString();
  history.replaceState(null, "", `${path || "#/"}${text ? `?${text}` : ""}`);
  dispatchEvent(new HashChangeEvent("hashchange"));
}

function decode(text: string): string {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}
