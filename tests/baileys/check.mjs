// An unmodified Baileys against warren-sim: an independent judge of the simulator.
//
//   node check.mjs ENDPOINT CONTROL ROOT_KEY DIRECTORY      prints one line per step; exit status 0: all was as expected

import assert from 'node:assert/strict'
import { Client, jid, nothingPending, phoneSays, request, shownAt, step, until } from './client.mjs'

const [ANA, BOB, EVE] = ['15550001', '15550002', '15550003']
const LOGGED_OUT = 401
const REPLACED = 440
const STATUS = { error: 0, delivered: 3, read: 4 }

/** `read` or `delivered_to` of a message that a phone sent names a device. */
function told(number, id, field, device) {
  return until(`phone ${number}: ${field} of ${id}`, async () => {
    const { messages } = await request('GET', `/phones/${number}/sent`)
    return messages.find(m => m.message_id === id)[field].includes(device)
  })
}

async function direct(a, b) {
  for (const addressing of ['pn', 'lid']) {
    await request('POST', `/phones/${EVE}/settings`, { addressing })
    const [id] = await phoneSays(EVE, ANA, `to the client by ${addressing}`)
    const got = await a.text(id)
    assert.equal(got.text, `to the client by ${addressing}`)
    await told(EVE, id, 'delivered_to', `${ANA}:1@s.whatsapp.net`)
    await a.sock.readMessages([got.key])
    await told(EVE, id, 'read_by', `${ANA}:1@s.whatsapp.net`)
    step(`direct message from a phone by ${addressing}, with delivery and read receipt`)
  }
  const id = await a.say(jid(EVE), 'to the phone')
  assert.equal((await shownAt(EVE, id, 'to the phone')).from, ANA)
  await shownAt(ANA, id, 'to the phone') // the own phone's copy
  await a.status(id, STATUS.delivered)
  await request('POST', `/phones/${EVE}/read`, { from: ANA, message_ids: [id] })
  await a.status(id, STATUS.read)
  step('direct message to a phone, with delivery and read receipt')
  const there = await a.say(jid(BOB), 'to the other client')
  assert.equal((await b.text(there)).text, 'to the other client')
  const back = await b.say(jid(ANA), 'and back')
  assert.equal((await a.text(back)).text, 'and back')
  step('direct messages between two Baileys')
}

async function groups(a, b) {
  const { id: group } = await request('POST', '/groups', { creator: EVE, participants: [ANA, BOB], subject: 'Three' })
  await until('the group at Baileys', () => a.groups.find(g => g.id === group))
  const info = await a.sock.groupMetadata(group)
  assert.equal(info.subject, 'Three')
  assert.equal(info.addressingMode, 'lid')
  assert.deepEqual(info.participants.map(p => p.phoneNumber), [EVE, ANA, BOB].map(jid))
  assert.deepEqual(Object.keys(await a.sock.groupFetchAllParticipating()), [group])
  for (const text of ['with the sender key', 'without it']) {
    const [id] = await phoneSays(EVE, group, text)
    for (const client of [a, b]) {
      const got = await client.text(id)
      assert.equal(got.text, text)
      assert.equal(got.key.remoteJid, group)
      assert.ok(got.key.participant.endsWith('@lid'))
    }
    await told(EVE, id, 'delivered_to', `${ANA}:1@s.whatsapp.net`)
  }
  step('group messages from a phone')
  for (const text of ['to the group', 'and again']) {
    const id = await a.say(group, text)
    assert.equal((await b.text(id)).text, text)
    for (const number of [EVE, BOB]) assert.equal((await shownAt(number, id, text)).group, group)
    await until('a receipt in the group at Baileys', () =>
      a.receipts.find(r => r.key.id === id) || a.messages.find(m => m.key.id === id && m.userReceipt?.length))
  }
  step('group messages from Baileys, with receipts')
}

async function offline(a) {
  await nothingPending(ANA)
  await a.close()
  await until('offline at the server', async () => {
    const { phones } = await request('GET', '/phones')
    return phones.find(p => p.number === ANA).devices.every(d => !d.connected)
  })
  const ids = await phoneSays(EVE, ANA, 'while away', 150)
  await a.open()
  await a.isOnline()
  for (const [i, id] of ids.entries()) assert.equal((await a.text(id)).text, `while away ${i + 1}`)
  await nothingPending(ANA)
  step('150 messages that waited, after a new login')
}

async function faults(a) {
  await request('POST', '/faults', { kind: 'send_error', phone: ANA, code: 463 })
  await a.status(await a.say(jid(EVE), 'refused'), STATUS.error)
  await request('POST', `/phones/${ANA}/devices/1/stream-error`, { conflict: 'replaced' })
  await until('Baileys told that it is replaced', () => a.ended === REPLACED)
  await request('POST', '/faults', { kind: 'login_failure', phone: ANA, code: 402, expire_s: 60 })
  await a.open()
  await until('Baileys told of the ban', () => a.ended === 402)
  await a.open()
  await a.isOnline()
  step('a message refused with 463, a connection replaced, a login refused with 402')
}

async function ends(a, b) {
  await a.sock.logout()
  await until('the device gone', async () => {
    const { phones } = await request('GET', '/phones')
    return phones.find(p => p.number === ANA).devices.length === 0
  })
  step('logout')
  await request('POST', `/phones/${BOB}/devices/1/unlink`, {})
  await until('Baileys told that it is unlinked', () => b.ended === LOGGED_OUT)
  step('unlinked by the phone')
}

for (const [number, name] of [[ANA, 'Ana'], [BOB, 'Bob'], [EVE, 'Eve']]) await request('POST', '/phones', { number, name })
const [a, b] = [new Client('ana'), new Client('bob')]
await a.pairByQR(ANA)
step('paired by QR')
await b.pairByCode(BOB)
step('paired by code')
await direct(a, b)
await groups(a, b)
await offline(a)
await faults(a)
const { phones } = await request('GET', '/phones')
for (const { number } of phones) {
  const { undecryptable } = await request('GET', `/phones/${number}/received`)
  assert.equal(undecryptable, 0, `undecryptable messages at ${number}`)
}
await ends(a, b)
console.log('all ok')
process.exit(0) // Baileys leaves timers behind
