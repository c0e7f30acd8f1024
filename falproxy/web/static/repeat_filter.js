/** One action is one job: repetitions of a double click or a held key are ignored. */

// ms in which an equal request is part of the same action, before and after its result is shown
const REPEAT_TIME = 1000;
const REPEAT_TIME_DONE = 400;

/** Create a filter for requests that are compared by their texts. */
export function createRepeatFilter() {
  let previous = { text: null, until: 0 };
  return {
    /** Return false if the request repeats the one before. @param {string} text */
    accepts(text) {
      const isRepeated = text === previous.text && performance.now() < previous.until;
      previous = { text, until: performance.now() + REPEAT_TIME };
      return !isRepeated;
    },
    /** The result is shown: an equal request soon after it is meant as another one. */
    shorten() {
      previous.until += REPEAT_TIME_DONE - REPEAT_TIME;
    },
  };
}

/**
 * Return a function that ignores calls soon after the one before, such as those of a double click.
 *
 * @param {Function} perform
 * @param {number} [time] ms
 */
export function onlyOnce(perform, time = REPEAT_TIME) {
  let until = 0;
  return (...args) => {
    const isRepeated = performance.now() < until;
    until = performance.now() + time;
    if (!isRepeated) {
      perform(...args);
    }
  };
}
