/** The time range of the dashboard, which is part of its URL: `?range=day`, or a custom one. */
import { byId } from "../dom.js";

const HOURS = { hour: 1, day: 24, week: 168, month: 720 };
const CUSTOM = "custom";

let range = "day";
let since = null; // Date, of a custom range
let until = null; // Date, or null for now

/** @param {() => void} onChange called when the user chooses another range */
export function startTimeRange(onChange) {
  const query = new URLSearchParams(location.search);
  since = parseDate(query.get("since"));
  until = parseDate(query.get("until"));
  range = query.get("range");
  if (!Object.hasOwn(HOURS, range) && !(range === CUSTOM && since !== null)) {
    range = "day";
  }
  byId("ranges").querySelector(`[value="${range}"]`).checked = true;
  byId("custom-range").hidden = range !== CUSTOM;
  setInputs();
  byId("ranges").addEventListener("change", (event) => {
    byId("custom-range").hidden = event.target.value !== CUSTOM;
    if (event.target.value === CUSTOM) {
      since ??= new Date(Date.now() - HOURS[range] * 3_600_000);
      setInputs();
      byId("range-since").focus();
      return;
    }
    range = event.target.value;
    setUrl();
    onChange();
  });
  byId("custom-range").addEventListener("submit", (event) => {
    event.preventDefault();
    since = new Date(byId("range-since").value);
    until = byId("range-until").value === "" ? null : new Date(byId("range-until").value);
    range = CUSTOM;
    setUrl();
    onChange();
  });
}

export function rangeName() {
  return range;
}

/** Return the range as a phrase, such as `the last hour`. */
export function rangePhrase() {
  return range === CUSTOM ? "the chosen time" : `the last ${range}`;
}

/** Return the query of the range. @returns {URLSearchParams} */
export function rangeQuery() {
  if (range !== CUSTOM) {
    return new URLSearchParams({ since: `${HOURS[range]}h` });
  }
  return customQuery(since, until);
}

/** Return the query of the range of the same length before. @returns {URLSearchParams} */
export function previousQuery() {
  if (range !== CUSTOM) {
    return new URLSearchParams({ since: `${2 * HOURS[range]}h`, until: `${HOURS[range]}h` });
  }
  const length = (until ?? new Date()) - since;
  return customQuery(new Date(since - length), since);
}

function customQuery(start, end) {
  const times = [
    ["since", start],
    ["until", end],
  ].filter(([, time]) => time !== null);
  return new URLSearchParams(times.map(([name, time]) => [name, time.toISOString()]));
}

function setUrl() {
  const url = new URL(location);
  url.searchParams.set("range", range);
  for (const [name, time] of [
    ["since", since],
    ["until", until],
  ]) {
    if (range === CUSTOM && time !== null) {
      url.searchParams.set(name, time.toISOString());
    } else {
      url.searchParams.delete(name);
    }
  }
  history.replaceState(null, "", url);
}

function setInputs() {
  byId("range-since").value = since === null ? "" : localTime(since);
  byId("range-until").value = until === null ? "" : localTime(until);
}

/** Return a time as a `datetime-local` input has it: in local time, to the minute. */
function localTime(time) {
  return new Date(time - time.getTimezoneOffset() * 60_000).toISOString().slice(0, 16);
}

function parseDate(text) {
  const time = new Date(text ?? "");
  return Number.isNaN(time.getTime()) ? null : time;
}
