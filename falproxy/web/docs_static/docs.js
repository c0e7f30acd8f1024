/**
 * Show the OpenAPI document in Swagger UI. Requests go to the server that this page was loaded
 * from.
 */
async function showDocs() {
  const url = new URL("openapi.json", document.baseURI);
  const response = await fetch(url);
  if (!response.ok) {
    throw new Error(`${url.pathname} responded with status ${response.status}`);
  }
  const spec = await response.json();
  spec.servers = [{ url: new URL(".", url).href.replace(/\/$/, "") }];
  const domNode = document.getElementById("docs");
  new MutationObserver(() => nameControls(domNode)).observe(domNode, {
    childList: true,
    subtree: true,
  });
  SwaggerUIBundle({
    spec,
    domNode,
    deepLinking: true,
    defaultModelsExpandDepth: 0,
    displayRequestDuration: true,
    persistAuthorization: false,
    requestInterceptor: removeEmptyFields,
    validatorUrl: null,
  });
}

const NAMES = {
  "#servers": "Server",
  ".examples-select-element": "Example",
  ".content-type-wrapper select": "Content type",
  "textarea.body-param__text": "Request body",
  ".copy-to-clipboard button": "Copy",
};

/** Name the controls that Swagger UI leaves without a name, for screen readers. */
function nameControls(docs) {
  for (const [selector, name] of Object.entries(NAMES)) {
    for (const control of docs.querySelectorAll(`${selector}:not([aria-label])`)) {
      control.setAttribute("aria-label", name);
    }
  }
  // They scroll sideways on narrow screens.
  for (const code of docs.querySelectorAll("pre.microlight:not([tabindex])")) {
    code.tabIndex = 0;
  }
  // A link inside a button, which expands the same operation.
  for (const link of docs.querySelectorAll(".opblock-summary-control a[href]")) {
    link.removeAttribute("href");
  }
}

/** Remove the empty fields of a form: the proxy would refuse an empty file as an invalid image. */
function removeEmptyFields(request) {
  if (request.body instanceof FormData) {
    for (const [name, value] of [...request.body]) {
      if (value === "") {
        request.body.delete(name);
      }
    }
  }
  return request;
}

showDocs().catch((error) => {
  const note = document.createElement("p");
  note.className = "note";
  note.textContent = `The page cannot be shown: ${error.message}.`;
  document.getElementById("docs").append(note);
});
