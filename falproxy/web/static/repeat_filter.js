/** Recognition of requests that one action of the user sent several times, such as a double click. */

const QUIET_TIME = 1000; // ms without an equal request, after which it is a new one

export class RepeatFilter {
  #previous = null; // {text, files, at} of the latest request

  /**
   * Return whether an equal request was made a moment ago. Each job costs money, and a double click,
   * or Enter and a click, stand for one.
   *
   * @param {import("./job_form.js").JobRequest} request
   */
  isRepeated({ model, prompt, options, imageInputs }) {
    const images = imageInputs.flatMap((input) => input.images);
    const files = images.map(({ file }) => file ?? null); // a file equals itself only
    const names = imageInputs.map(({ name, images: { length } }) => [name, length]);
    const urls = images.map(({ url }) => url ?? null);
    const text = JSON.stringify([model.endpoint, prompt, options, names, urls]);
    const previous = this.#previous;
    this.#previous = { text, files, at: performance.now() };
    return (
      previous !== null &&
      previous.text === text &&
      previous.files.length === files.length &&
      previous.files.every((file, index) => file === files[index]) &&
      this.#previous.at - previous.at < QUIET_TIME
    );
  }
}
