/** The header of the page with the API, which is not a part of the other pages. */
import { renderHeader } from "./header.js";

renderHeader("docs");
