// Unmodified Baileys clients against warren-sim, for check.mjs and leave.mjs. Baileys pins the key that WhatsApp's Noise certificates come
// from in the exported object WA_CERT_DETAILS; the simulator's key is put there, as whatsmeow has whatsmeow.WACertPubKey for it. TLS trusts the
// simulator's CA through NODE_EXTRA_CA_CERTS. The command line of both programs: ENDPOINT CONTROL ROOT_KEY DIRECTORY

import assert from 'node:assert/strict'
import path from 'node:path'
import makeWASocket, { WA_CERT_DETAILS, useMultiFileAuthState } from 'baileys'

const [endpoint, control, rootKey, directory] = process.argv.slice(2)
const STEP_MS = 30_000
const RESTART_REQUIRED = 515

WA_CERT_DETAILS.PUBLIC_KEY = Buffer.from(rootKey, 'hex')

// libsignal for JavaScript prints whole sessions; only what this program says is for stdout.
console.info = console.warn = console.error = process.env.BAILEYS_LOG ? console.error : () => {}
const silent = { level: 'silent', child: () => silent }
for (const level of ['trace', 'debug', 'info', 'warn', 'error', 'fatal']) {
  silent[level] = process.env.BAILEYS_LOG ? (...args) => console.error(level, JSON.stringify(args)) : () => {}
}

export async function request(method, at, body) {
  const response = await fetch(control + at, { method, body: body && JSON.stringify(body) })
  const answer = await response.json()
  assert.equal(response.status, 200, `${method} ${at}: ${JSON.stringify(answer)}`)
  return answer
}

export async function until(what, condition) {
  for (const end = Date.now() + STEP_MS; ; await new Promise(r => setTimeout(r, 20))) {
    const met = await condition()
    if (met) return met
    assert.ok(Date.now() < end, `waited in vain for: ${what}`)
  }
}

export const step = what => console.log(`ok ${what}`)

/** One linked device: a Baileys socket that connects again when it is asked to (515), and what it has seen. */
export class Client {
  messages = []
  updates = []
  receipts = []
  groups = []
  qr = undefined
  online = false
  ended = undefined

  constructor(name) {
    this.name = name
    this.folder = path.join(directory, name)
  }

  async open() {
    const { state, saveCreds } = await useMultiFileAuthState(this.folder)
    this.online = false
    this.ended = undefined
    this.sock = makeWASocket({
      auth: state, waWebSocketUrl: `${endpoint}/ws/chat`, logger: silent, shouldSyncHistoryMessage: () => false,
      getMessage: async key => this.sent?.get(key.id),
    })
    const on = (event, take) => this.sock.ev.on(event, take)
    on('creds.update', saveCreds)
    on('connection.update', update => this.#connection(update))
    on('messages.upsert', ({ messages }) => this.messages.push(...messages))
    on('messages.update', updates => this.updates.push(...updates))
    on('message-receipt.update', receipts => this.receipts.push(...receipts))
    on('groups.upsert', groups => this.groups.push(...groups))
    return this
  }

  #connection({ connection, qr, lastDisconnect }) {
    if (qr) this.qr = qr
    if (connection === 'open') this.online = true
    if (connection !== 'close') return
    this.online = false
    const status = lastDisconnect?.error?.output?.statusCode
    if (status === RESTART_REQUIRED) void this.open()
    else this.ended = status
  }

  async pairByQR(number) {
    await this.open()
    await until(`${this.name}: a QR code`, () => this.qr)
    await request('POST', `/phones/${number}/scan`, { qr: this.qr })
    await this.isOnline()
  }

  async pairByCode(number) {
    await this.open()
    await until(`${this.name}: a QR code`, () => this.qr)
    const code = await this.sock.requestPairingCode(number)
    // The request has gone out when the code is returned, but the server may not have it yet.
    await until(`${this.name}: the code accepted`, async () => {
      const response = await fetch(`${control}/phones/${number}/pair-code`, { method: 'POST', body: JSON.stringify({ code }) })
      const answer = await response.json()
      if (response.status === 404) return false
      assert.equal(response.status, 200, JSON.stringify(answer))
      return true
    })
    await this.isOnline()
  }

  isOnline() {
    return until(`${this.name}: online`, () => this.online)
  }

  async close() {
    this.sock.end(undefined)
    await until(`${this.name}: closed`, () => !this.online)
  }

  async say(to, text) {
    const message = await this.sock.sendMessage(to, { text })
    return message.key.id
  }

  /** Waits until a message has a status. An update that comes while the message is being announced is folded into it. */
  status(id, wanted) {
    return until(`${this.name}: message ${id} has status ${wanted}`, () =>
      this.updates.some(u => u.key.id === id && u.update.status === wanted) ||
      this.messages.some(m => m.key.id === id && m.status === wanted))
  }

  text(id) {
    return until(`${this.name}: message ${id}`, () => {
      const message = this.messages.find(m => m.key.id === id && textOf(m))
      return message && { ...message, text: textOf(message) }
    })
  }
}

const textOf = m => m.message?.conversation ?? m.message?.extendedTextMessage?.text
export const jid = number => `${number}@s.whatsapp.net`

export async function phoneSays(number, to, text, count = 1) {
  return (await request('POST', `/phones/${number}/send`, { to, text, count })).message_ids
}

export function shownAt(number, id, text) {
  return until(`phone ${number}: ${text}`, async () => {
    const { shown } = await request('GET', `/phones/${number}/received`)
    const message = shown.find(m => m.message_id === id)
    if (message) assert.equal(message.text, text)
    return message
  })
}

export async function nothingPending(...numbers) {
  for (const number of numbers) {
    await until(`nothing pending for ${number}`, async () => {
      const { devices } = await request('GET', `/phones/${number}/pending`)
      return devices.every(d => d.pending === 0)
    })
  }
}
