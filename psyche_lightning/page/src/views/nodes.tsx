/** Everybody who is or was in a run. */

import * as format from "../format";
import type { Node, Run } from "../model";
import { Moment, Tag } from "../parts";
import { link, setOptions } from "../route";

const HERE = new Set(["healthy", "pending"]);

const delivered = (node: Node): number | null => {
  const { delivered = 0, late = 0, absent = 0, excluded = 0 } = node.rounds ?? {};
  const all = delivered + late + absent + excluded;
  return all ? delivered / all : null;
};

interface Column {
  name: string;
  title: string;
  text: (node: Node) => string;
  order: (node: Node) => number;
}

const number = (name: string, title: string, value: (node: Node) => number | null | undefined, text: (value: number | null | undefined) => string): Column => ({
  name, title, text: node => text(value(node)), order: node => -(value(node) ?? -Infinity),
});

const COLUMNS: Column[] = [
  number("share", "Share", node => node.share, format.percent),
  number("delivered", "Delivered", delivered, value => format.percent(value)),
  number("step", "Step", node => node.step, format.count),
  number("loss", "Loss", node => node.loss, format.loss),
  number("tokens", "Tokens/s", node => node.tokens_per_second, format.short),
  number("up", "Sent", node => node.bytes_up, format.bytes),
  number("down", "Received", node => node.bytes_down, format.bytes),
  number("points", "Points", node => node.points, format.count),
];

export function Nodes({ run, id, options }: { run: Run; id: string; options: URLSearchParams }) {
  const wanted = (options.get("filter") ?? "").toLowerCase();
  const sort = options.get("sort");
  const column = COLUMNS.find(one => one.name === sort);
  const all = [...run.nodes.values()]
    .filter(node => [node.signer, node.status, node.address, node.reason, node.region].join(" ").toLowerCase().includes(wanted))
    .sort((a, b) => (column ? column.order(a) - column.order(b) : 0) || (a.joined ?? 0) - (b.joined ?? 0));
  const columns = COLUMNS.filter(one => column === one || all.some(node => one.text(node) !== "–"));
  const finished = run.status.phase === "finished";
  const here = all.filter(node => HERE.has(node.status) || (finished && node.status === "finished"));
  const gone = all.filter(node => !here.includes(node));

  if (!run.nodes.size) return <p class="empty">No node has joined yet.</p>;
  return (
    <section>
      <div class="toolbar">
        <input type="search" aria-label="Filter nodes" placeholder="Filter" value={options.get("filter") ?? ""} onInput={event => setOptions({ filter: event.currentTarget.value })} />
      </div>
      <Regions nodes={here} chosen={options.get("filter") ?? ""} />
      <Table title={finished ? "At the end" : "Here now"} nodes={here} columns={columns} id={id} sort={sort} gone={false} />
      {gone.length > 0 && <Table title="No longer here" nodes={gone} columns={columns.filter(one => one.name !== "share")} id={id} sort={sort} gone />}
    </section>
  );
}

/** Where the nodes are that say so, and what each region brings; a press shows its nodes alone. */
function Regions({ nodes, chosen }: { nodes: Node[]; chosen: string }) {
  const found = new Map<string, Node[]>();
  for (const node of nodes) if (node.region) found.set(node.region, [...(found.get(node.region) ?? []), node]);
  if (!found.size) return null;
  const silent = nodes.length - [...found.values()].flat().length;
  const sum = (all: Node[], value: (node: Node) => number | null | undefined) => all.reduce((total, node) => total + (value(node) ?? 0), 0);
  const most = Math.max(...[...found.values()].map(all => all.length));
  return (
    <section class="regions">
      <h2>By region{silent > 0 && <span class="soft"> {format.counted(silent, "node does", "nodes do")} not say</span>}</h2>
      <ul>
        {[...found].sort(([a, x], [b, y]) => y.length - x.length || a.localeCompare(b)).map(([region, all]) => (
          <li key={region}>
            <button type="button" aria-pressed={chosen === region} onClick={() => setOptions({ filter: chosen === region ? null : region })}>
              <b>{region}</b>
              <span class="amount" aria-hidden="true"><i style={{ width: `${(100 * all.length) / most}%` }} /></span>
              <span class="soft">{format.counted(all.length, "node")}, {format.short(sum(all, node => node.tokens_per_second))} tokens/s</span>
            </button>
          </li>
        ))}
      </ul>
    </section>
  );
}

function Table({ title, nodes, columns, id, sort, gone }: { title: string; nodes: Node[]; columns: Column[]; id: string; sort: string | null; gone: boolean }) {
  const regions = nodes.some(node => node.region);
  return (
    <>
      <h2>{title} <span class="soft">{nodes.length}</span></h2>
      {nodes.length > 0 ? (
        <div class="scroll" tabIndex={0} role="region" aria-label={title}>
          <table class="nodes folds">
            <thead>
              <tr>
                <th scope="col">Node</th>
                <th scope="col">Status</th>
                {regions && <th scope="col">Region</th>}
                {columns.map(column => (
                  <th key={column.name} scope="col" class="n" aria-sort={sort === column.name ? "descending" : undefined}>
                    <button type="button" onClick={() => setOptions({ sort: sort === column.name ? null : column.name })}>{column.title}</button>
                  </th>
                ))}
                <th scope="col">{gone ? "Left" : "Joined"}</th>
                <th scope="col" class={gone ? undefined : "address"}>{gone ? "Why" : "Address"}</th>
              </tr>
            </thead>
            <tbody>
              {nodes.map(node => (
                <tr key={node.signer}>
                  <th scope="row"><a href={link(id, "nodes", node.signer)}><code>{node.key}</code></a></th>
                  <td><Tag state={node.status} /></td>
                  {regions && <td data-label="Region">{node.region ?? "–"}</td>}
                  {columns.map(column => <td key={column.name} class="n" data-label={column.title}>{column.text(node)}</td>)}
                  <td class="date" data-label={gone ? "Left" : "Joined"}><Moment time={gone ? node.left : node.joined} /></td>
                  <td class={gone ? "long" : "address"} data-label={gone ? "Why" : "Address"}>{gone ? node.reason || "–" : node.address ? <code>{node.address}</code> : "–"}</td>
                </tr>
              ))}
            </tbody>
          </table>
        </div>
      ) : <p class="empty">None.</p>}
    </>
  );
}
