// The OpenAPI description as a page, without anything from outside.
document.documentElement.dataset.theme = localStorage.theme ?? (matchMedia("(prefers-color-scheme: light)").matches ? "light" : "dark");
const api = await (await fetch("/openapi.json")).json();
const make = (tag, text, ...children) => {
  const element = document.createElement(tag);
  element.textContent = text;
  element.append(...children);
  return element;
};
const groups = new Map();
for (const [path, methods] of Object.entries(api.paths)) {
  for (const [method, operation] of Object.entries(methods)) {
    const tag = operation.tags?.[0] ?? "other";
    const line = make("summary", "", make("b", method.toUpperCase()), make("code", path), make("span", operation.summary));
    line.lastChild.className = "muted";
    const body = operation.requestBody?.content["application/json"]?.schema;
    const schema = body && (api.components.schemas[body.$ref?.split("/").pop()] ?? body);
    const parts = [make("p", operation.description ?? "")];
    if (schema) parts.push(make("pre", JSON.stringify(schema.properties ?? schema, null, 2)));
    groups.set(tag, [...(groups.get(tag) ?? []), make("details", "", line, ...parts)]);
  }
}
for (const [tag, operations] of groups) document.getElementById("operations").append(make("h2", tag), ...operations);
