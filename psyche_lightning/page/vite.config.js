import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { defineConfig } from "vite";

const BUNDLED = ["preact", "uplot"];

/** What travels with the build: the licences of the parts in it. */
function notice() {
  const parts = BUNDLED.map(name => {
    const folder = new URL(`./node_modules/${name}/`, import.meta.url);
    const { version } = JSON.parse(readFileSync(new URL("package.json", folder), "utf8"));
    return `${name} ${version}\n\n${readFileSync(new URL("LICENSE", folder), "utf8").trim()}`;
  });
  const head = "Built from psyche_lightning/page (npm run build); edit the sources there. It contains:";
  return `<!--\n${[head, ...parts].join("\n\n").replaceAll("--", "- -")}\n-->`;
}

const hash = text => `'sha256-${createHash("sha256").update(text).digest("base64")}'`;

/** Puts script and style into the page, and a policy that allows these two and nothing else. */
function inline() {
  return {
    name: "inline",
    enforce: "post",
    generateBundle(_, bundle) {
      const files = Object.values(bundle);
      const page = files.find(file => file.fileName.endsWith(".html"));
      const script = files.filter(file => file.type === "chunk").map(file => file.code.trim()).join("\n").replaceAll("</script", "<\\/script");
      const style = files.filter(file => file.fileName.endsWith(".css")).map(file => String(file.source).trim()).join("\n");
      const policy = [
        "default-src 'none'", `script-src ${hash(script)}`, `style-src ${hash(style)}`,
        "connect-src 'self'", "img-src data:", "base-uri 'none'", "form-action 'none'",
      ].join("; ");
      const html = String(page.source)
        .replace(/\s*<script type="module"[^>]*><\/script>/, "")
        .replace(/\s*<link rel="stylesheet"[^>]*>/, "")
        .replace("<!doctype html>", () => `<!doctype html>\n${notice()}`)
        .replace('<meta charset="utf-8">', () => `<meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" content="${policy}">`)
        .replace("</head>", () => `<style>${style}</style>\n</head>`)
        .replace("</body>", () => `<script type="module">${script}</script>\n</body>`);
      for (const file of files) delete bundle[file.fileName];
      this.emitFile({ type: "asset", fileName: "page.html", source: html });
    },
  };
}

// `npm run dev` shows the page beside a running coordinator.
const coordinator = process.env.COORDINATOR ?? "http://127.0.0.1:8080";

export default defineConfig({
  base: "./",
  plugins: [inline()],
  build: {
    outDir: "../server",
    emptyOutDir: false,
    target: ["chrome123", "firefox120", "safari17.5"],
    modulePreload: false,
    rollupOptions: { input: "page.html" },
  },
  server: { open: "/page.html", proxy: { "/v1": { target: coordinator, ws: true, changeOrigin: true } } },
});
