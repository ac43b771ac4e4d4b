"use strict";

// What a state is called, and which of the four groups it belongs to.
const STATES = {
  online: ["Online", "good"],
  time_locked: ["Online, limited", "good"],
  restoring: ["Restoring", "busy"],
  connecting: ["Connecting", "busy"],
  pairing: ["Waiting for a phone", "busy"],
  backing_off: ["Reconnecting", "busy"],
  stopping: ["Disconnecting", "busy"],
  stopped: ["Disconnected", "off"],
  logged_out: ["Logged out", "bad"],
  replaced: ["Used elsewhere", "bad"],
  blocked: ["Blocked", "bad"],
  outdated: ["Out of date", "bad"],
  quarantined: ["Needs repair", "bad"],
};
const GROUPS = [["all", "All"], ["good", "Online"], ["busy", "On the way"], ["bad", "Need someone"], ["off", "Disconnected"]];
// Where `create` does something, and where `disconnect` does nothing. A ban is waited out, whatever is asked for.
const CONNECTABLE = ["stopped", "logged_out", "replaced", "outdated", "quarantined", "backing_off"];
const ENDED = ["stopped", "stopping", "logged_out", "replaced", "outdated", "quarantined"];

const $ = (id) => document.getElementById(id);
const sessions = new Map(); // id -> what the server said last
const rows = new Map(); // id -> its <li>
let me = { reader: false, token: false, csrf: null };
let stream = null;
let group = "all";
let shownCode = null; // the session whose code dialog is open

function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

function svg(tag, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const stateOf = (session) => STATES[session.state] ?? [session.state, "busy"];

// --- times

function ago(time) {
  const seconds = Math.max(0, (Date.now() - Date.parse(time)) / 1000);
  if (seconds < 45) return "just now";
  for (const [one, more, size] of [["day", "days", 86400], ["hour", "hours", 3600]]) {
    const count = Math.round(seconds / size);
    if (count >= 1) return `${count} ${count === 1 ? one : more} ago`;
  }
  return `${Math.max(1, Math.round(seconds / 60))} min ago`;
}

function when(time, never) {
  if (!time) return never;
  return el("time", { datetime: time, title: new Date(time).toLocaleString() }, ago(time));
}

function refreshTimes() {
  for (const shown of document.querySelectorAll("time")) shown.textContent = ago(shown.dateTime);
  countDown();
}

// --- talking to the server

async function post(path, body) {
  let response;
  try {
    response = await fetch(path, {
      method: "POST",
      headers: { "Content-Type": "application/json", "X-Warren-Csrf": me.csrf ?? "" },
      body: JSON.stringify(body),
    });
  } catch {
    return { error: { message: "warrend cannot be reached.", hint: "Is it running?" } };
  }
  const answer = await response.json().catch(() => ({ error: { message: `The server answered ${response.status}.`, hint: "" } }));
  if (answer.error?.code === "token_needed") start();
  return answer;
}

// The daemon's hints speak to programmers; here there are buttons.
const spoken = (text) =>
  (text ?? "")
    .replace(/publish `create`/g, "press Connect")
    .replace(/Publish `create`/g, "Press Connect")
    .replaceAll("`logout`", "Log out")
    .replaceAll("`disconnect`", "Disconnect")
    .replaceAll("`connected`", "Online")
    .replaceAll("`", "");
const sentence = (error) => spoken([error.message, error.hint].filter(Boolean).join(" "));

// Gives a command; true when it was done or goes on by itself. What went wrong is told in `place`, else at the bottom.
async function command(name, session, args, place) {
  const answer = await post("/page/command", { command: name, session, args });
  if (answer.error) {
    if (place) place.textContent = sentence(answer.error);
    else toast(`${session}: ${sentence(answer.error)}`);
    return false;
  }
  if (answer.pending) toast(`${session}: asked for. It takes longer than usual; the list shows what becomes of it.`);
  return true;
}

async function start() {
  stream?.close();
  stream = null;
  try {
    me = await (await fetch("/page/me")).json();
  } catch {
    link("lost", "warrend cannot be reached; trying again");
    setTimeout(start, 3000);
    return;
  }
  $("sign-in").hidden = me.reader || !me.token;
  $("app").hidden = !me.reader;
  $("sign-out").hidden = !me.csrf;
  $("new").hidden = !me.csrf;
  $("read-only").hidden = me.token;
  if (!me.reader) {
    for (const dialog of document.querySelectorAll("dialog[open]")) dialog.close();
    link("", me.token ? "" : "This page answers only to 127.0.0.1 and localhost.");
    $("token").focus();
    return;
  }
  listen();
}

function listen() {
  stream = new EventSource("/page/events");
  let first = true;
  stream.addEventListener("open", () => {
    first = true; // a new stream begins with everything
    link("live", "Live");
  });
  stream.addEventListener("sessions", (event) => {
    const news = JSON.parse(event.data);
    if (first) {
      const known = new Set(news.sessions.map((session) => session.session));
      news.gone = [...sessions.keys()].filter((id) => !known.has(id));
      first = false;
    }
    for (const session of news.sessions) sessions.set(session.session, session);
    for (const id of news.gone) sessions.delete(id);
    showProblems(news.problems);
    showSessions([...news.sessions.map((session) => session.session), ...news.gone]);
  });
  stream.addEventListener("error", () => {
    link("lost", "Connection lost; trying again");
    // A refusal ends the stream for good: we may have been signed out, or warrend is starting.
    if (stream?.readyState === EventSource.CLOSED) setTimeout(start, 3000);
  });
}

function link(state, text) {
  const shown = $("link");
  shown.className = `link ${state}`;
  if (shown.textContent !== text) shown.textContent = text;
  $("app").classList.toggle("stale", state === "lost");
}

function toast(text) {
  const shown = el("p", {}, text);
  $("toasts").append(shown);
  setTimeout(() => shown.remove(), 4000 + text.length * 60);
}

// --- the list

function showProblems(problems) {
  $("problems").replaceChildren(
    ...problems.map((problem) =>
      el("li", { class: problem.blocking ? "blocking" : null }, el("strong", {}, spoken(problem.message)), el("span", {}, spoken(problem.hint))),
    ),
  );
}

function showSessions(changed) {
  for (const id of changed) {
    const session = sessions.get(id);
    const old = rows.get(id);
    if (!session) {
      old?.remove();
      rows.delete(id);
      continue;
    }
    const row = drawRow(session);
    // A button that was in use stays in use, although its row is new.
    const focused = old?.contains(document.activeElement) ? document.activeElement.dataset.act : null;
    if (old) old.replaceWith(row);
    rows.set(id, row);
    if (focused) row.querySelector(`[data-act="${focused}"]`)?.focus();
  }
  const list = $("sessions");
  const order = [...rows.keys()].sort();
  order.forEach((id, place) => {
    if (list.children[place] !== rows.get(id)) list.insertBefore(rows.get(id), list.children[place] ?? null);
  });
  showGroups();
  filter();
  if (shownCode !== null) drawCode();
}

function fact(name, ...value) {
  return el("div", {}, el("dt", {}, name), el("dd", {}, ...value));
}

function drawRow(session) {
  const [name, kind] = stateOf(session);
  const number = session.jid ? `+${session.jid.split(/[:@]/)[0]}` : null;
  const who = [session.push_name, number].filter(Boolean).join(" · ");
  const why = session.state === "online" ? "" : sentence({ message: session.message, hint: session.hint });
  const until = session.until ? ` Until ${new Date(session.until).toLocaleString()}.` : "";
  return el(
    "li",
    { class: `row ${kind}`, "data-session": session.session, "data-state": session.state },
    el("div", { class: "who" }, el("strong", {}, session.session), el("span", {}, who || "No phone linked yet")),
    el(
      "div",
      {},
      el("span", { class: `badge ${kind}` }, name),
      el(
        "dl",
        { class: "facts" },
        fact("Since", when(session.since, "–")),
        fact("Last message", when(session.last_message_at, "none yet")),
        fact("Last backup", when(session.backup?.at, "none yet")),
        fact("Backlog", String(session.outbox ?? 0)),
      ),
    ),
    el("div", { class: "acts" }, ...actions(session)),
    el("p", { class: "why" }, why + until),
  );
}

function actions(session) {
  const id = session.session;
  const button = (act, text, kind, what) =>
    el("button", { type: "button", class: kind, "data-act": act, "aria-label": `${text}: ${id}`, onclick: what }, text);
  const made = [];
  if (session.qr || session.pairing_code) {
    made.push(button("code", session.qr ? "Show QR code" : "Show pairing code", "primary", () => openCode(id)));
  }
  if (!me.csrf) return made;
  if (CONNECTABLE.includes(session.state)) made.push(button("connect", "Connect", "", () => connect(id)));
  if (!ENDED.includes(session.state)) made.push(button("disconnect", "Disconnect", "", () => disconnect(id)));
  made.push(button("logout", "Log out…", "plain", () => askLogout(id)));
  return made;
}

function showGroups() {
  const counts = { all: sessions.size };
  for (const session of sessions.values()) {
    const kind = stateOf(session)[1];
    counts[kind] = (counts[kind] ?? 0) + 1;
  }
  for (const [kind] of GROUPS) {
    const button = $("groups").querySelector(`[data-group="${kind}"]`);
    button.querySelector("b").textContent = counts[kind] ?? 0;
    button.hidden = kind !== "all" && kind !== group && !counts[kind];
    button.setAttribute("aria-pressed", String(kind === group));
  }
}

function filter() {
  const wanted = $("search").value.trim().toLowerCase();
  let visible = 0;
  for (const [id, row] of rows) {
    const session = sessions.get(id);
    const text = `${id} ${session.push_name ?? ""} ${session.jid ?? ""}`.toLowerCase();
    row.hidden = (group !== "all" && stateOf(session)[1] !== group) || !text.includes(wanted);
    visible += row.hidden ? 0 : 1;
  }
  $("none").hidden = visible > 0;
  $("none").textContent = sessions.size ? "No session is like that." : "No sessions yet. Create one, and link a phone to it.";
}

// --- a code to link a phone with

function openCode(id) {
  shownCode = id;
  drawCode();
  if (!$("code").open) $("code").showModal();
}

function drawCode() {
  const session = sessions.get(shownCode);
  const body = $("code-body");
  const shown = JSON.stringify([shownCode, session?.state, session?.qr, session?.pairing_code]);
  if (body.dataset.shown === shown) return;
  body.dataset.shown = shown;
  $("code-title").textContent = shownCode;
  if (session?.qr) {
    const { path, size, expires_at: expires } = session.qr;
    const drawn = svg("path", { d: path, fill: "#000000" });
    body.replaceChildren(
      svg("svg", { class: "qr", viewBox: `0 0 ${size} ${size}`, role: "img", "aria-label": `QR code of ${shownCode}`, "shape-rendering": "crispEdges" }, drawn),
      el("p", {}, "In WhatsApp on the phone: Settings, Linked devices, Link a device. Then scan this code."),
      el("p", { class: "muted", id: "countdown", "data-expires": expires }),
    );
  } else if (session?.pairing_code) {
    const { code, expires_at: expires } = session.pairing_code;
    body.replaceChildren(
      el("p", { class: "letters" }, code),
      el("p", {}, "In WhatsApp on the phone: Settings, Linked devices, Link a device, Link with phone number instead. Then type this code."),
      el("p", { class: "muted", id: "countdown", "data-expires": expires }),
    );
  } else if (session && stateOf(session)[1] === "good") {
    const tick = svg("path", { d: "M14 25l8 8 14-16", fill: "none", stroke: "currentColor", "stroke-width": "4", "stroke-linecap": "round", "stroke-linejoin": "round" });
    body.replaceChildren(
      svg("svg", { class: "tick", viewBox: "0 0 48 48", "aria-hidden": "true" }, svg("circle", { cx: "24", cy: "24", r: "21", fill: "none", stroke: "currentColor", "stroke-width": "3" }), tick),
      el("p", { class: "big", role: "status" }, "Connected"),
      el("p", { class: "muted" }, session.push_name ? `Linked with the phone of ${session.push_name}.` : "The phone is linked."),
    );
  } else {
    const said = session ? stateOf(session)[0] : "On its way";
    const why = session ? sentence({ message: session.message, hint: session.hint }) : "";
    body.replaceChildren(el("p", { class: "big", role: "status" }, `${said}…`), el("p", { class: "muted" }, why));
  }
  countDown();
}

function countDown() {
  const shown = $("countdown");
  if (!shown) return;
  const left = Math.round((Date.parse(shown.dataset.expires) - Date.now()) / 1000);
  shown.textContent = left > 0 ? `Valid for another ${left} s; the next one comes by itself.` : "Expired; waiting for the next one.";
}

// --- what people do

async function connect(id) {
  if (await command("create", id, {})) openCode(id);
}

async function disconnect(id) {
  if (await command("disconnect", id, {})) toast(`${id} is disconnected. Its phone stays linked.`);
}

function askLogout(id) {
  const dialog = $("confirm");
  $("confirm-title").textContent = `Log out ${id}?`;
  $("confirm-text").textContent =
    "WhatsApp unlinks this device, and warren deletes the session with its keys and backups. To use it again, somebody must link a phone anew.";
  dialog.querySelector(".error").textContent = "";
  $("confirm-form").onsubmit = async (event) => {
    event.preventDefault();
    await busy(dialog, async () => {
      if (await command("logout", id, {}, dialog.querySelector(".error"))) {
        dialog.close();
        toast(`${id} is logged out.`);
      }
    });
  };
  dialog.showModal();
}

async function busy(dialog, work) {
  const button = dialog.querySelector("[type=submit]");
  button.disabled = true;
  try {
    await work();
  } finally {
    button.disabled = false;
  }
}

$("new").addEventListener("click", () => {
  $("create-form").reset();
  $("create").querySelector(".error").textContent = "";
  $("create").showModal();
});

$("create-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const [id, phone] = [$("create-name").value.trim(), $("create-phone").value.trim()];
  const place = $("create").querySelector(".error");
  place.textContent = "";
  await busy($("create"), async () => {
    if (await command("create", id, phone ? { phone_number: phone } : {}, place)) {
      $("create").close();
      openCode(id);
    }
  });
});

$("sign-in").addEventListener("submit", async (event) => {
  event.preventDefault();
  $("sign-in-error").textContent = "";
  const answer = await post("/page/sign-in", { token: $("token").value });
  if (answer.error) {
    $("sign-in-error").textContent = sentence(answer.error);
    $("token").select();
    return;
  }
  $("token").value = "";
  start();
});

$("sign-out").addEventListener("click", async () => {
  await post("/page/sign-out", {});
  start();
});

for (const [kind, text] of GROUPS) {
  const choose = () => {
    group = kind;
    showGroups();
    filter();
  };
  $("groups").append(el("button", { type: "button", "data-group": kind, onclick: choose }, text, el("b", {}, "0")));
}
$("search").addEventListener("input", filter);
for (const button of document.querySelectorAll("[data-close]")) button.addEventListener("click", () => button.closest("dialog").close());
$("code").addEventListener("close", () => {
  shownCode = null;
  delete $("code-body").dataset.shown;
});
setInterval(refreshTimes, 1000);
showGroups();
start();
