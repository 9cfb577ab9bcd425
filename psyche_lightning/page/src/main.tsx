/** The coordinator's page: which view is shown, and what is around it. */

import { render } from "preact";
import { useEffect, useState } from "preact/hooks";
import { Feed, type State } from "./feed";
import * as format from "./format";
import { idOf, progressOf, stateOf, type Line } from "./model";
import { Clock } from "./parts";
import { link, read, type Route } from "./route";
import "./style.css";
import { choose, chosen, type Theme } from "./theme";
import { Runs } from "./views/runs";
import { RunView } from "./views/run";

const feed = new Feed();

function useFeed(): State {
  const [state, setState] = useState(feed.state);
  useEffect(() => feed.subscribe(() => setState(feed.state)), []);
  return state;
}

function useRoute(): Route {
  const [route, setRoute] = useState(() => read(location.hash));
  useEffect(() => {
    const changed = () => setRoute(read(location.hash));
    addEventListener("hashchange", changed);
    return () => removeEventListener("hashchange", changed);
  }, []);
  return route;
}

function App() {
  const state = useFeed();
  const route = useRoute();
  useEffect(() => feed.watch(route.run), [route.run]);
  useEffect(() => scrollTo(0, 0), [route.run, route.tab, route.node]);
  const lines = state.runs ? [...state.runs.values()] : null;

  // Who opens the page of a coordinator with one run wants to see that.
  useEffect(() => {
    if (!location.hash && lines?.length === 1) location.replace(link(idOf(lines[0]!)));
  }, [lines?.length]);

  // A run that is closed goes on being shown, from the archive; of several ones of its name, the newest.
  useEffect(() => {
    if (!state.error || !lines) return;
    const [kept] = lines.filter(one => one.archived != null && one.run_id === route.run).sort((a, b) => b.archived! - a.archived!);
    if (kept) location.replace(link(idOf(kept), route.tab, route.node, Object.fromEntries(route.options)));
  }, [state.error, state.runs]);

  const line = state.run?.status;
  const progress = line ? progressOf(line) : null;
  useEffect(() => {
    document.title = line
      ? `${progress === null || stateOf(line) === "finished" ? "" : `${format.percent(progress)} `}${line.run_id} – ${stateOf(line)}`
      : "psyche – runs";
  }, [line?.run_id, line && stateOf(line), progress === null ? null : Math.round(100 * progress)]);

  return (
    <Clock.Provider value={feed}>
      <a class="skip" href="#main" onClick={event => { event.preventDefault(); document.getElementById("main")?.focus(); }}>Skip to the content</a>
      <header class={`top ${state.link}`}>
        <a class="brand" href={link(null)}>
          <svg viewBox="0 0 16 16" width="18" height="18" aria-hidden="true"><path d="M2 3c4 9 7 10 12 10" fill="none" stroke="currentColor" stroke-width="2.4" stroke-linecap="round" /></svg>
          psyche
        </a>
        <nav class="where" aria-label="Runs">
          <a href={link(null)} aria-current={route.run === null ? "page" : undefined}>Runs</a>
          {route.run !== null && lines && <Switcher lines={lines} route={route} />}
        </nav>
        <Connection state={state} />
        <ThemeSwitch />
      </header>
      <main id="main" tabIndex={-1}>
        {route.run === null
          ? lines ? <Runs lines={lines} mostClosed={state.mostClosed} options={route.options} /> : <p class="empty">{state.link === "away" ? "The coordinator does not answer." : "Asking the coordinator …"}</p>
          : state.error ? <section class="nothing"><h1>No such run</h1><p>{state.error}</p><p><a href={link(null)}>All runs</a></p></section>
          : state.run ? <RunView run={state.run} id={route.run} route={route} /> : <p class="empty">{state.link === "away" ? "The coordinator does not answer." : "Asking the coordinator …"}</p>}
      </main>
    </Clock.Provider>
  );
}

/** The run that is shown, and a way to the others. */
function Switcher({ lines, route }: { lines: Line[]; route: Route }) {
  const known = lines.some(line => idOf(line) === route.run);
  return (
    <select aria-label="Run" value={route.run!} onChange={event => { location.hash = link(event.currentTarget.value, route.tab); }}>
      {!known && <option value={route.run!}>{route.run}</option>}
      {lines.map(line => <option key={idOf(line)} value={idOf(line)}>{line.run_id}{line.archived != null ? ` (closed ${format.moment(line.archived)})` : ""}</option>)}
    </select>
  );
}

function Connection({ state }: { state: State }) {
  const [, tick] = useState(0);
  useEffect(() => {
    if (state.awaySince === null) return;
    const timer = setInterval(() => tick(n => n + 1), 1000);
    return () => clearInterval(timer);
  }, [state.awaySince]);
  const lasts = state.awaySince === null ? 0 : (Date.now() - state.awaySince) / 1000;
  const text = state.link === "live" ? "live" : state.link === "connecting" ? "connecting" : "the coordinator does not answer";
  return (
    <span id="link" class={state.link}>
      <span role="status">{text}</span>
      {state.link === "away" && lasts >= 3 && <span> for {format.lasting(Math.floor(lasts))}</span>}
    </span>
  );
}

const THEMES: Record<Theme, [next: Theme, text: string, path: string]> = {
  auto: ["light", "as the system has it", "M8 2a6 6 0 0 1 0 12z"],
  light: ["dark", "light", "M8 5a3 3 0 1 0 0 6 3 3 0 0 0 0-6zM8 1v1.6M8 13.4V15M1 8h1.6M13.4 8H15M3 3l1.2 1.2M11.8 11.8 13 13M13 3l-1.2 1.2M4.2 11.8 3 13"],
  dark: ["auto", "dark", "M13.5 9.5A6 6 0 0 1 6.5 2.5a6 6 0 1 0 7 7z"],
};

function ThemeSwitch() {
  const [theme, setTheme] = useState(chosen());
  const [next, text, path] = THEMES[theme];
  const label = `Colours: ${text}. Change to ${next === "auto" ? "the system's" : next}.`;
  return (
    <button id="theme" type="button" aria-label={label} title={label} onClick={() => { choose(next); setTheme(next); }}>
      <svg viewBox="0 0 16 16" width="16" height="16" aria-hidden="true">{theme === "auto" ? <><circle cx="8" cy="8" r="6" fill="none" stroke="currentColor" stroke-width="1.3" /><path d={path} fill="currentColor" /></> : <path d={path} fill={theme === "light" ? "none" : "currentColor"} stroke="currentColor" stroke-width="1.3" stroke-linecap="round" />}</svg>
    </button>
  );
}

choose(chosen());
render(<App />, document.getElementById("app")!);
