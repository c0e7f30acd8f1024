/** Axes of a chart: the ticks of the value axis and the labels of the time axis. */

/**
 * Return the ticks of an axis that starts at 0, in steps of 1, 2, 2.5 or 5 times a power of ten.
 *
 * @param {number} max the largest value
 * @param {boolean} isWhole whether the values are whole numbers
 * @returns {number[]} from 0 to at least `max`
 */
export function axisTicks(max, isWhole = false) {
  if (!(max > 0)) {
    return [0, 1];
  }
  const minStep = isWhole ? 1 : Number.MIN_VALUE;
  const roughStep = Math.max(max / 4, minStep);
  const power = 10 ** Math.floor(Math.log10(roughStep));
  const factors = isWhole && power === 1 ? [1, 2, 5, 10] : [1, 2, 2.5, 5, 10];
  const steps = factors.map((factor) => factor * power);
  const step = steps.find((candidate) => candidate >= roughStep * 0.999);
  const ticks = [];
  for (let n = 0; n === 0 || ticks.at(-1) < max * 0.9999; n += 1) {
    ticks.push(Number((n * step).toPrecision(12)));
  }
  return ticks;
}

const LABEL_STEPS = [1, 2, 3, 4, 5, 6, 7, 10, 12, 14, 15, 20, 24, 30, 48, 60, 72, 120, 240];

/**
 * Return the indexes of the points with a label: evenly spaced, at most `max`, including the last.
 */
export function labeledIndexes(points, max) {
  const step = LABEL_STEPS.find((candidate) => points / candidate <= max) ?? points;
  const indexes = Array.from({ length: points }, (_, n) => n);
  return indexes.filter((n) => (points - 1 - n) % step === 0);
}
