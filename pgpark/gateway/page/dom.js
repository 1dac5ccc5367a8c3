// Making and keeping elements. All text goes in as text, never as HTML.

/** An element with attributes, listeners (onclick: ...), and children; null and false children are left out. */
export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

/** An element of SVG, the same way. */
export function drawn(name, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

export const byId = (id) => document.getElementById(id);

/** Sets text only where it changed, so that selections and screen readers are left alone. */
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
  return node;
}

/**
 * Makes the children of a parent those of `items`, in order, and keeps the element of each key: what has focus keeps it, and
 * what moves can be seen to move. make(item) makes one, update(node, item) sets what may have changed.
 */
export function keep(parent, items, key, make, update) {
  const focused = parent.contains(document.activeElement) ? document.activeElement : null;
  const place = focused ? [...parent.children].findIndex((child) => child.contains(focused)) : -1;
  const kept = (parent.kept ??= new Map());
  const wanted = new Set(items.map(key));
  for (const [old, node] of kept) {
    if (!wanted.has(old)) {
      node.remove();
      kept.delete(old);
    }
  }
  items.forEach((item, index) => {
    const name = key(item);
    let node = kept.get(name);
    if (!node) {
      node = make(item);
      kept.set(name, node);
    }
    update?.(node, item, index);
    if (parent.children[index] !== node) parent.insertBefore(node, parent.children[index] ?? null);
  });
  if (focused && !parent.contains(document.activeElement)) focusNear(parent, focused, place);
}

/** What was moved has lost the focus, and gets it back; of what is gone, the neighbour gets it. */
function focusNear(parent, focused, place) {
  const beside = parent.children[Math.min(place, parent.children.length - 1)];
  const stop = beside?.matches("[data-stop], a") ? beside : beside?.querySelector("[data-stop], a, button");
  const next = focused.isConnected ? focused : stop ?? parent.closest("[tabindex]");
  next?.focus({ preventScroll: true });
}

/** One tab stop for a group of buttons: arrows, Home and End move between them. Called after each drawing. */
export function rove(group) {
  const stops = [...group.querySelectorAll("[data-stop]")];
  if (stops.length === 0) return;
  const current = stops.includes(document.activeElement) ? document.activeElement : stops.find((s) => s.tabIndex === 0) ?? stops[0];
  for (const stop of stops) stop.tabIndex = stop === current ? 0 : -1;
  if (group.roves) return;
  group.roves = true;
  group.addEventListener("keydown", (event) => {
    const all = [...group.querySelectorAll("[data-stop]")];
    const at = all.indexOf(document.activeElement);
    const right = getComputedStyle(group).flexDirection === "row-reverse" ? -1 : 1;
    const steps = { ArrowRight: right, ArrowDown: 1, ArrowLeft: -right, ArrowUp: -1 };
    const to = event.key === "Home" ? 0 : event.key === "End" ? all.length - 1 : at + (steps[event.key] ?? NaN);
    if (at < 0 || !all[to]) return;
    event.preventDefault();
    for (const stop of all) stop.tabIndex = -1;
    all[to].tabIndex = 0;
    all[to].focus();
  });
}
