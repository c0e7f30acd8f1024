/**
 * Shows the document that is beside this page. Calls go to where the page came from, whatever name
 * the document has for it.
 */
async function show() {
  const place = new URL("openapi.json", document.baseURI);
  const response = await fetch(place);
  if (!response.ok) {
    throw new Error(`${place.pathname} is a ${response.status}`);
  }
  const spec = await response.json();
  spec.servers = [{ url: new URL(".", place).href.replace(/\/$/, "") }];
  SwaggerUIBundle({
    spec,
    domNode: document.getElementById("docs"),
    deepLinking: true,
    defaultModelsExpandDepth: 0,
    displayRequestDuration: true,
    persistAuthorization: false,
    requestInterceptor: withoutEmptyFields,
    validatorUrl: null,
  });
}

/** A field of a form that is left empty is not sent: an empty file is no picture. */
function withoutEmptyFields(request) {
  if (request.body instanceof FormData) {
    for (const [name, value] of [...request.body]) {
      if (value === "") {
        request.body.delete(name);
      }
    }
  }
  return request;
}

show().catch((error) => {
  const note = document.createElement("p");
  note.className = "note";
  note.textContent = `The page cannot be shown: ${error.message}.`;
  document.getElementById("docs").append(note);
});
