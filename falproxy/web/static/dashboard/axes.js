/** Axes: where numbers and times are on a chart. */

/**
 * The ends of an axis from nought: even steps of 1, 2, 2.5 or 5 by powers of ten.
 *
 * @param {number} most the largest value
 * @param {boolean} isWhole whether there is nothing between 0 and 1
 * @returns {number[]} from 0 up to at least `most`
 */
export function ticks(most, isWhole = false) {
  const least = isWhole ? 1 : Number.MIN_VALUE;
  const rough = Math.max(most / 4, least);
  if (!(most > 0)) {
    return [0, 1];
  }
  const power = 10 ** Math.floor(Math.log10(rough));
  const factors = isWhole && power === 1 ? [1, 2, 5, 10] : [1, 2, 2.5, 5, 10];
  const step = factors.map((factor) => factor * power).find((each) => each >= rough * 0.999);
  const found = [];
  for (let n = 0; n === 0 || found.at(-1) < most * 0.9999; n += 1) {
    found.push(Number((n * step).toPrecision(12)));
  }
  return found;
}

/** Which of so many points get a label, when there is room for so many: even and a round number apart. */
export function labelled(points, room) {
  const apart = [1, 2, 3, 4, 5, 6, 7, 10, 12, 14, 15, 20, 24, 30, 48, 60, 72, 120, 240];
  const step = apart.find((each) => points / each <= room) ?? points;
  return Array.from({ length: points }, (_, n) => n).filter((n) => (points - 1 - n) % step === 0);
}
