/** The live connection to the coordinator: what it tells is folded into one state. */

import type { Line, Lists, Node, Run, Status } from "./model";

type LinkState = "connecting" | "live" | "away";

export interface State {
  link: LinkState;
  /** Since when the coordinator has not answered, in milliseconds of this machine's clock. */
  awaySince: number | null;
  /** Null until the coordinator has told its runs. */
  runs: Map<string, Line> | null;
  /** Of how many closed runs the coordinator keeps the history. */
  mostClosed: number | null;
  run: Run | null;
  /** Why there is no such run. */
  error: string | null;
}

interface Chunk<T> { first: number; kept: number; items: T[] }

interface Message {
  now: number;
  runs?: Record<string, Line | null>;
  most_closed?: number;
  run?: Partial<Status>;
  nodes?: Record<string, Node | null>;
  lists?: { [K in keyof Lists]?: Chunk<Lists[K][number]> };
  error?: string;
}

/** A list of which the coordinator keeps the newest entries; the first one held has the place `kept`. */
class Grown<T> {
  items: T[] = [];
  private kept = 0;

  fold({ first, kept, items }: Chunk<T>): void {
    const own = Math.min(Math.max(0, first - this.kept), this.items.length);
    const joins = this.kept + own === first;
    const begin = joins ? this.kept : first;
    const all = joins ? [...this.items.slice(0, own), ...items] : items;
    this.items = all.slice(Math.max(0, kept - begin));
    this.kept = Math.max(kept, begin);
  }
}

/** The page's own folder: a proxy may serve the coordinator below a path, with or without the slash at its end. */
export const home = location.origin + location.pathname.replace(/[^/]*\.html$/, "").replace(/\/*$/, "/");

const SILENCE = 25_000;
const FIRST_WAIT = 500;
const LONGEST_WAIT = 10_000;

export class Feed {
  state: State = { link: "connecting", awaySince: null, runs: null, mostClosed: null, run: null, error: null };
  private ahead = 0;
  private wanted: string | null = null;
  private socket: WebSocket | null = null;
  private lists = emptyLists();
  private wait = FIRST_WAIT;
  private timer = 0;
  private listeners = new Set<() => void>();

  constructor() {
    document.addEventListener("visibilitychange", () => {
      if (document.visibilityState === "visible" && this.state.link === "away") this.connect();
    });
  }

  subscribe(listener: () => void): () => void {
    this.listeners.add(listener);
    return () => this.listeners.delete(listener);
  }

  /** The coordinator's date, in seconds. */
  now(): number {
    return Date.now() / 1000 + this.ahead;
  }

  /** Follow a run beside the list of all, or the list alone. */
  watch(run: string | null): void {
    if (this.socket && run === this.wanted) return;
    this.wanted = run;
    this.set({ run: null, error: null });
    this.connect();
  }

  private connect(): void {
    clearTimeout(this.timer);
    this.socket?.close();
    const query = this.wanted === null ? "" : `?run=${encodeURIComponent(this.wanted)}`;
    const socket = this.socket = new WebSocket(`${home.replace(/^http/, "ws")}v1/feed${query}`);
    let whole = true;
    socket.onmessage = ({ data }) => {
      if (socket !== this.socket) return;
      this.wait = FIRST_WAIT;
      this.fold(JSON.parse(data) as Message, whole);
      whole = false;
      this.expect(SILENCE, () => socket.close());
    };
    socket.onclose = () => {
      if (socket !== this.socket) return;
      this.set({ link: "away", awaySince: this.state.awaySince ?? Date.now() });
      this.expect(this.wait, () => this.connect());
      this.wait = Math.min(2 * this.wait, LONGEST_WAIT);
    };
    this.expect(SILENCE, () => socket.close());
  }

  private expect(milliseconds: number, then: () => void): void {
    clearTimeout(this.timer);
    this.timer = window.setTimeout(then, milliseconds);
  }

  private fold(message: Message, whole: boolean): void {
    this.ahead = message.now - Date.now() / 1000;
    const next: Partial<State> = { link: "live", awaySince: null };
    if (message.runs) next.runs = merged(whole ? null : this.state.runs, message.runs);
    if (message.most_closed !== undefined) next.mostClosed = message.most_closed;
    if (message.error !== undefined) {
      next.error = message.error;
      next.run = null;
    } else if (this.wanted !== null && (message.run || message.nodes || message.lists)) {
      const before = whole ? null : this.state.run;
      if (whole) this.lists = emptyLists();
      for (const name of ["events", "metrics", "past", "rounds"] as const) {
        const chunk = message.lists?.[name];
        if (chunk) (this.lists[name] as Grown<unknown>).fold(chunk);
      }
      next.error = null;
      next.run = {
        status: { ...before?.status, ...message.run } as Status,
        nodes: message.nodes ? merged(before?.nodes ?? null, message.nodes) : before?.nodes ?? new Map(),
        events: this.lists.events.items,
        metrics: this.lists.metrics.items,
        past: this.lists.past.items,
        rounds: this.lists.rounds.items,
      };
    }
    this.set(next);
  }

  private set(change: Partial<State>): void {
    this.state = { ...this.state, ...change };
    for (const listener of this.listeners) listener();
  }
}

function emptyLists(): { [K in keyof Lists]: Grown<Lists[K][number]> } {
  return { events: new Grown(), metrics: new Grown(), past: new Grown(), rounds: new Grown() };
}

function merged<T>(before: Map<string, T> | null, changes: Record<string, T | null>): Map<string, T> {
  const after = new Map(before);
  for (const [key, value] of Object.entries(changes)) {
    if (value === null) after.delete(key);
    else after.set(key, value);
  }
  return after;
}
