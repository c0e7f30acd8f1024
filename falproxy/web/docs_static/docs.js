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
  SwaggerUIBundle({
    spec,
    domNode: document.getElementById("docs"),
    deepLinking: true,
    defaultModelsExpandDepth: 0,
    displayRequestDuration: true,
    persistAuthorization: false,
    requestInterceptor: removeEmptyFields,
    validatorUrl: null,
  });
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
